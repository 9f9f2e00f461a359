/* CRC-32 by a table, as Ethernet has it. */
#include "parts.h"

static uint32_t table[256];

static void fill(void)
{
	for (uint32_t index = 0; index < 256; index++) {
		uint32_t value = index;
		for (int bit = 0; bit < 8; bit++)
			value = value & 1 ? value >> 1 ^ 0xedb88320u : value >> 1;
		table[index] = value;
	}
}

uint32_t checksum(const void *bytes, size_t length)
{
	const uint8_t *next = bytes;
	uint32_t value = ~0u;

	if (!table[1])
		fill();
	while (length--)
		value = value >> 8 ^ table[(value ^ *next++) & 255];
	return ~value;
}
