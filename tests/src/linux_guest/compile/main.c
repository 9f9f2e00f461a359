#include <stdio.h>
#include "parts.h"

int main(void)
{
	printf("program: %d primes, %08x, %d queens, %d sorted, %d words, %.9f, %.9f\n", primes(100000), checksum("123456789", 9), queens(8),
	       sorted(5000), words(1000, 101), root(2), pi());
	return 0;
}
