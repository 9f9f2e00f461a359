/* How many different words there are among those of the squares of numbers, by a table of lists. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "parts.h"

struct word {
	struct word *next;
	char text[16];
};

int words(int count, int modulus)
{
	struct word *table[64] = { 0 };
	int different = 0;

	for (int number = 0; number < count; number++) {
		struct word *word, **list;
		char text[16];

		snprintf(text, sizeof text, "word%d", number * number % modulus);
		list = &table[checksum(text, strlen(text)) % 64];
		for (word = *list; word && strcmp(word->text, text); word = word->next)
			;
		if (word)
			continue;
		word = malloc(sizeof *word);
		if (!word)
			return -1;
		strcpy(word->text, text);
		word->next = *list;
		*list = word;
		different++;
	}
	return different;
}
