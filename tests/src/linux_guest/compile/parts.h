/* What the program is made of: each part in a unit of its own, with an answer that is known. */
#include <stddef.h>
#include <stdint.h>

uint32_t checksum(const void *bytes, size_t length);
int primes(int below);
int queens(int size);
int sorted(int count);
int words(int count, int modulus);
double root(double of);
double pi(void);
