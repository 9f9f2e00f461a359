/* The sieve of Eratosthenes. */
#include <stdlib.h>
#include "parts.h"

int primes(int below)
{
	char *composite = calloc(below, 1);
	int count = 0;

	if (!composite)
		return -1;
	for (int number = 2; number < below; number++) {
		if (composite[number])
			continue;
		count++;
		for (long multiple = (long)number * number; multiple < below; multiple += number)
			composite[multiple] = 1;
	}
	free(composite);
	return count;
}
