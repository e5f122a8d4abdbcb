/* The disk that carries what the harness gives and takes: a file of the host, read at each access. */
#ifndef CARRIER_DISK_H
#define CARRIER_DISK_H

#include <stdbool.h>
#include <stdint.h>

enum { SECTOR_BYTES = 512 };

/* Needs I/O privilege. False if there is no answer or the disk reports an error. */
bool disk_read(uint32_t sector, uint32_t count, void *data);
bool disk_write(uint32_t sector, uint32_t count, const void *data);

#endif
