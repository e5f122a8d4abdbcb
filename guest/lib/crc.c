#include "lib/crc.h"

static uint16_t crc16_table[256];
static uint32_t crc32_table[256];

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
		crc32_table[byte] = crc32_value;
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
	uint32_t crc = ~0u;
	for (size_t i = 0; i < bytes; i++)
		crc = (crc >> 8) ^ crc32_table[(uint8_t)crc ^ data[i]];
	return ~crc;
}
