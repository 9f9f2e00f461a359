/* How many numbers of a row that the C library has sorted are in order. */
#include <stdlib.h>
#include "parts.h"

static int compare(const void *one, const void *other)
{
	uint32_t a = *(const uint32_t *)one, b = *(const uint32_t *)other;

	return (a > b) - (a < b);
}

int sorted(int count)
{
	uint32_t *row = malloc(count * sizeof *row), next = 1;
	int in_order = 1;

	if (!row)
		return -1;
	for (int index = 0; index < count; index++)
		row[index] = next = next * 1664525u + 1013904223u;
	qsort(row, count, sizeof *row, compare);
	while (in_order < count && row[in_order - 1] <= row[in_order])
		in_order++;
	free(row);
	return in_order;
}
