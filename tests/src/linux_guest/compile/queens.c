/* In how many ways so many queens stand on a board and none takes another. */
#include "parts.h"

static int place(int size, int row, unsigned columns, unsigned left, unsigned right)
{
	int ways = 0;

	if (row == size)
		return 1;
	for (int column = 0; column < size; column++) {
		unsigned bit = 1u << column;
		if (!((columns | left | right) & bit))
			ways += place(size, row + 1, columns | bit, (left | bit) << 1, (right | bit) >> 1);
	}
	return ways;
}

int queens(int size)
{
	return place(size, 0, 0, 0, 0);
}
