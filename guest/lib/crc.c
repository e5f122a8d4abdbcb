#include "lib/crc.h"

enum { SLICES = 8 };

static uint16_t crc16_table[256];
/* [n][byte]: what `byte` does to the checksum with n more bytes behind it. */
static uint32_t crc32_tables[SLICES][256];

void crc_init(void)
{
	for (uint32_t byte = 0; byte < 256; byte++) {
		uint16_t crc16_value = (uint16_t)(byte << 8);
		uint32_t crc32_value = byte;
		for (int bit = 0; bit < 8; bit++) {
			crc16_value = (uint16_t)((crc16_value << 1) ^ (crc16_value & 0x8000 ? 0x1021 : 0));
			crc32_value = (crc32_value >> 1) ^ (crc32_value & 1 ? 0xedb88320u : 0);
		}
		crc16_table[byte] = crc16_value;
		crc32_tables[0][byte] = crc32_value;
	}
	for (unsigned int slice = 1; slice < SLICES; slice++)
		for (uint32_t byte = 0; byte < 256; byte++) {
			uint32_t before = crc32_tables[slice - 1][byte];
			crc32_tables[slice][byte] = (before >> 8) ^ crc32_tables[0][(uint8_t)before];
		}
}

uint16_t crc16(const char *text, size_t bytes)
{
	uint16_t crc = 0;
	for (size_t i = 0; i < bytes; i++)
		crc = (uint16_t)((crc << 8) ^ crc16_table[(crc >> 8) ^ (uint8_t)text[i]]);
	return crc;
}

uint32_t crc32(const uint8_t *data, size_t bytes)
{
	return crc32_continue(0, data, bytes);
}

uint32_t crc32_continue(uint32_t crc, const uint8_t *data, size_t bytes)
{
	crc = ~crc;
	for (; bytes >= SLICES; bytes -= SLICES, data += SLICES) {
		uint64_t word;
		__builtin_memcpy(&word, data, sizeof(word));
		word ^= crc;
		crc = crc32_tables[7][(uint8_t)word] ^ crc32_tables[6][(uint8_t)(word >> 8)] ^
		      crc32_tables[5][(uint8_t)(word >> 16)] ^ crc32_tables[4][(uint8_t)(word >> 24)] ^
		      crc32_tables[3][(uint8_t)(word >> 32)] ^ crc32_tables[2][(uint8_t)(word >> 40)] ^
		      crc32_tables[1][(uint8_t)(word >> 48)] ^ crc32_tables[0][word >> 56];
	}
	for (; bytes; bytes--)
		crc = (crc >> 8) ^ crc32_tables[0][(uint8_t)crc ^ *data++];
	return ~crc;
}
