/* Real numbers: a root by Newton's way, pi by Machin's. */
#include "parts.h"

double root(double of)
{
	double guess = of;

	for (int step = 0; step < 60; step++)
		guess = (guess + of / guess) / 2;
	return guess;
}

static double arc_tangent(double of)
{
	double power = of, sum = 0;

	for (int step = 1; step < 60; step += 2) {
		sum += step % 4 == 1 ? power / step : -power / step;
		power *= of * of;
	}
	return sum;
}

double pi(void)
{
	return 16 * arc_tangent(1.0 / 5) - 4 * arc_tangent(1.0 / 239);
}
