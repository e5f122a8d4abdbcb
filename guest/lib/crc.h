/* Checksums: CRC-16/XMODEM for records, CRC-32 (IEEE 802.3, as zlib's) for what the host sends. */
#ifndef LIB_CRC_H
#define LIB_CRC_H

#include <stddef.h>
#include <stdint.h>

void crc_init(void);
uint16_t crc16(const char *text, size_t bytes);
uint32_t crc32(const uint8_t *data, size_t bytes);

/* The CRC-32 of what `crc` is the CRC-32 of (0: of nothing) with `data` behind it. Quick: eight bytes a round. */
uint32_t crc32_continue(uint32_t crc, const uint8_t *data, size_t bytes);

#endif
