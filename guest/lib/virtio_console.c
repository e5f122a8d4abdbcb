/*
 * Sections are those of the Virtual I/O Device (VIRTIO) specification, version 1.1. The device is reached by
 * registers in memory (4.2), as QEMU's machine `microvm` has it.
 */
#include "lib/virtio_console.h"

#include "cpu/registers.h"
#include "lib/memory.h"

/* Where that machine has its transports. On other machines nothing is there, or nothing that says "virt". */
#define TRANSPORTS_BASE 0xfeb00000u
enum {
	TRANSPORT_BYTES = 512,
	TRANSPORTS = 24,
};

/* 4.2.2: the registers, 32 bits each. */
enum {
	MAGIC = 0x00,
	VERSION = 0x04,
	DEVICE_ID = 0x08,
	DEVICE_FEATURES = 0x10,
	DEVICE_FEATURES_SELECT = 0x14,
	DRIVER_FEATURES = 0x20,
	DRIVER_FEATURES_SELECT = 0x24,
	QUEUE_SELECT = 0x30,
	QUEUE_SIZE_MAX = 0x34,
	QUEUE_SIZE = 0x38,
	QUEUE_READY = 0x44,
	QUEUE_NOTIFY = 0x50,
	DEVICE_STATUS = 0x70,
	QUEUE_DESCRIPTORS = 0x80, /* 64-bit addresses, low half first */
	QUEUE_AVAILABLE = 0x90,
	QUEUE_USED = 0xa0,

	MAGIC_VALUE = 0x74726976, /* "virt" */
	VERSION_VALUE = 2,
	DEVICE_CONSOLE = 3, /* section 5 */
};

/* 2.1 */
enum {
	STATUS_ACKNOWLEDGE = 1,
	STATUS_DRIVER = 2,
	STATUS_DRIVER_OK = 4,
	STATUS_FEATURES_OK = 8,
};

/* 6: bit 32, the first of the second word. */
#define FEATURE_VERSION_1 (1u << 0)
/* 5.3.3; without SIZE, which is of no use here. */
#define FEATURE_MULTIPORT (1u << 1)

/* 5.3.2: after port 0's pair come the control queues, and then the pairs of the other ports. */
enum {
	PORT = 1,
	QUEUE_CONTROL_RECEIVE = 2,
	QUEUE_CONTROL_TRANSMIT = 3,
	QUEUE_RECEIVE = 4,
	QUEUE_TRANSMIT = 5,
};

/* 5.3.6.2 */
enum {
	EVENT_DEVICE_READY = 0,
	EVENT_PORT_ADD = 1,
	EVENT_PORT_READY = 3,
	EVENT_PORT_OPEN = 6,
	EVENT_PORT_NAME = 7,
};
struct control {
	uint32_t port;
	uint16_t event;
	uint16_t value;
};

enum {
	DESCRIPTOR_WRITE = 2, /* the device writes */
	AVAILABLE_NO_INTERRUPT = 1,
};

enum {
	RECEIVE_BUFFERS = 32,
	QUEUE_ENTRIES = RECEIVE_BUFFERS,
	RECEIVE_BYTES = 1024,
	LOOKS_ALONE = 512,
	CONTROL_BUFFERS = 32,
	CONTROL_BYTES = 64,
	/* Seconds: a device of another thread may be slow; one that is dead is the rare case. */
	TELL_LOOKS = 1 << 26,
};

/* 2.6.5, 2.6.6, 2.6.8: the three parts of a split virtqueue. */
struct descriptor {
	uint64_t address;
	uint32_t bytes;
	uint16_t flags;
	uint16_t next;
};
struct available_ring {
	uint16_t flags;
	volatile uint16_t index;
	uint16_t entries[QUEUE_ENTRIES];
};
struct used_ring {
	uint16_t flags;
	volatile uint16_t index;
	struct {
		uint32_t id;
		uint32_t bytes;
	} entries[QUEUE_ENTRIES];
} __attribute__((aligned(4)));
struct queue {
	struct descriptor descriptors[QUEUE_ENTRIES] __attribute__((aligned(16)));
	struct available_ring available;
	struct used_ring used;
	uint16_t number;
	/* Buffers made available so far, unpublished ones too; without end, like all indexes here. */
	uint16_t posted;
	uint16_t seen; /* used buffers taken back so far */
};

static uint8_t receive_buffers[RECEIVE_BUFFERS][RECEIVE_BYTES];
static uint8_t control_buffers[CONTROL_BUFFERS][CONTROL_BYTES];

static uint64_t registers; /* the address of the first */
static struct queue control_receive, control_transmit, receive, transmit;

/* The buffer that is being read: its number, and how much of it. */
static uint32_t current, position, filled;
static unsigned int unpublished; /* receive buffers read, and not yet given back */

static size_t offered; /* bytes that the device has and has not yet taken */

/* --- the transport ----------------------------------------------------------------------------------- */

static uint32_t get(uint32_t offset)
{
	return *(const volatile uint32_t *)at_physical(registers + offset);
}

static void set(uint32_t offset, uint32_t value)
{
	*(volatile uint32_t *)at_physical(registers + offset) = value;
}

static void set_address(uint32_t offset, const void *memory)
{
	set(offset, (uint32_t)(uintptr_t)memory);
	set(offset + 4, (uint32_t)((uint64_t)(uintptr_t)memory >> 32));
}

/* Only a hypervisor has one: elsewhere nothing is asked. */
static bool find_device(void)
{
	if (!under_hypervisor())
		return false;
	for (unsigned int i = 0; i < TRANSPORTS; i++) {
		registers = TRANSPORTS_BASE + i * TRANSPORT_BYTES;
		if (get(MAGIC) == MAGIC_VALUE && get(VERSION) == VERSION_VALUE &&
		    get(DEVICE_ID) == DEVICE_CONSOLE)
			return true;
	}
	return false;
}

static void set_status(uint8_t status)
{
	set(DEVICE_STATUS, status);
}

/* 3.1.1, steps 2 to 6. */
static bool take_features(void)
{
	set_status(STATUS_ACKNOWLEDGE | STATUS_DRIVER);
	set(DEVICE_FEATURES_SELECT, 0);
	if (!(get(DEVICE_FEATURES) & FEATURE_MULTIPORT))
		return false;
	set(DRIVER_FEATURES_SELECT, 0);
	set(DRIVER_FEATURES, FEATURE_MULTIPORT);
	set(DRIVER_FEATURES_SELECT, 1);
	set(DRIVER_FEATURES, FEATURE_VERSION_1);
	set_status(STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
	return get(DEVICE_STATUS) & STATUS_FEATURES_OK;
}

static bool queue_start(struct queue *queue, uint16_t number)
{
	set(QUEUE_SELECT, number);
	if (get(QUEUE_SIZE_MAX) < QUEUE_ENTRIES)
		return false;
	queue->number = number;
	queue->posted = queue->seen = 0;
	queue->available.index = queue->used.index = 0;
	queue->available.flags = AVAILABLE_NO_INTERRUPT;
	set(QUEUE_SIZE, QUEUE_ENTRIES);
	set_address(QUEUE_DESCRIPTORS, queue->descriptors);
	set_address(QUEUE_AVAILABLE, &queue->available);
	set_address(QUEUE_USED, &queue->used);
	set(QUEUE_READY, 1);
	return true;
}

/* What was written to memory before is written when the device hears of it: x86 keeps stores in order. */
static void queue_notify(struct queue *queue)
{
	asm volatile("" : : : "memory");
	queue->available.index = queue->posted;
	asm volatile("" : : : "memory");
	set(QUEUE_NOTIFY, queue->number);
}

/* --- queues ------------------------------------------------------------------------------------------ */

static void describe(struct queue *queue, uint16_t id, const void *buffer, size_t bytes, uint16_t flags)
{
	queue->descriptors[id] = (struct descriptor){(uintptr_t)buffer, (uint32_t)bytes, flags, 0};
}

/* Makes a buffer available; the device sees that with the next notification. */
static void post(struct queue *queue, uint32_t id)
{
	queue->available.entries[queue->posted++ % QUEUE_ENTRIES] = (uint16_t)id;
}

/*
 * Memory is polled without leaving the processor, so who runs us on the same processor might wait for it in
 * vain: see cpu/heartbeat.c. CPUID is a VM exit wherever there is a hypervisor (SDM Vol. 3C, 26.1.2).
 */
static void let_the_host_run(void)
{
	static unsigned int looks;
	if (++looks % LOOKS_ALONE == 0)
		cpuid(0);
}

/* Takes back a buffer that the device is through with: its number, and what the device wrote. */
static bool take_used(struct queue *queue, uint32_t *id, uint32_t *bytes)
{
	uint16_t entry = queue->seen % QUEUE_ENTRIES;
	if (queue->used.index == queue->seen) {
		let_the_host_run();
		return false;
	}
	queue->seen++;
	*id = queue->used.entries[entry].id;
	*bytes = queue->used.entries[entry].bytes;
	asm volatile("" : : : "memory");
	return true;
}

/* --- the control queues: which port is ours ---------------------------------------------------------- */

/* When the device has taken the message, what it has to say to it is in the control receive queue. */
static bool tell(uint16_t event)
{
	static struct control message;
	uint32_t id, bytes;
	message = (struct control){event == EVENT_DEVICE_READY ? 0 : PORT, event, 1};
	describe(&control_transmit, 0, &message, sizeof(message), 0);
	post(&control_transmit, 0);
	queue_notify(&control_transmit);
	for (uint32_t looks = 0; looks < TELL_LOOKS; looks++)
		if (take_used(&control_transmit, &id, &bytes))
			return true;
	return false;
}

static bool is_our_name(const uint8_t *buffer, uint32_t bytes)
{
	static const char name[] = VIRTIO_CONSOLE_PORT_NAME;
	const uint8_t *text = buffer + sizeof(struct control);
	uint32_t length = sizeof(name) - 1;
	bytes -= sizeof(struct control);
	if (bytes < length || memcmp(text, name, length) != 0)
		return false;
	return bytes == length || text[length] == 0; /* QEMU ends it with a zero, the specification doesn't */
}

/* Asks about the port; true if it is there and has our name. Ports of others are not touched. */
static bool find_port(void)
{
	uint32_t id, bytes;
	if (!tell(EVENT_DEVICE_READY))
		return false;
	while (take_used(&control_receive, &id, &bytes)) {
		struct control message;
		memcpy(&message, control_buffers[id], sizeof(message));
		if (bytes >= sizeof(message) && message.port == PORT) {
			if (message.event == EVENT_PORT_NAME)
				return is_our_name(control_buffers[id], bytes);
			if (message.event == EVENT_PORT_ADD && !tell(EVENT_PORT_READY))
				return false;
		}
		post(&control_receive, id);
		queue_notify(&control_receive);
	}
	return false;
}

/* --- the interface ----------------------------------------------------------------------------------- */

static bool start_queues(void)
{
	if (!queue_start(&control_receive, QUEUE_CONTROL_RECEIVE) ||
	    !queue_start(&control_transmit, QUEUE_CONTROL_TRANSMIT) ||
	    !queue_start(&receive, QUEUE_RECEIVE) || !queue_start(&transmit, QUEUE_TRANSMIT))
		return false;
	for (uint16_t id = 0; id < CONTROL_BUFFERS; id++) {
		describe(&control_receive, id, control_buffers[id], CONTROL_BYTES, DESCRIPTOR_WRITE);
		post(&control_receive, id);
	}
	for (uint16_t id = 0; id < RECEIVE_BUFFERS; id++) {
		describe(&receive, id, receive_buffers[id], RECEIVE_BYTES, DESCRIPTOR_WRITE);
		post(&receive, id);
	}
	return true;
}

static bool open_port(void)
{
	set_status(0);
	if (!take_features() || !start_queues())
		return false;
	set_status(STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
	queue_notify(&control_receive);
	queue_notify(&receive);
	return find_port() && tell(EVENT_PORT_OPEN);
}

bool virtio_console_init(void)
{
	if (!find_device())
		return false;
	position = filled = unpublished = 0;
	offered = 0;
	if (open_port())
		return true;
	set_status(0); /* it must not write to our memory any more */
	return false;
}

size_t virtio_console_send(const char *bytes, size_t count)
{
	uint32_t id, written;
	if (!offered) {
		describe(&transmit, 0, bytes, count, 0);
		post(&transmit, 0);
		queue_notify(&transmit);
		offered = count;
	}
	if (!take_used(&transmit, &id, &written))
		return 0;
	count = offered;
	offered = 0;
	return count;
}

/*
 * Buffers are given back by halves, which spares notifications. No input waits for that: when the device has
 * no buffer left, then those not yet given back and those still to be read are all there are, and reading on
 * completes the half.
 */
static void give_back(uint32_t id)
{
	post(&receive, id);
	if (++unpublished < RECEIVE_BUFFERS / 2)
		return;
	unpublished = 0;
	queue_notify(&receive);
}

bool virtio_console_can_read(void)
{
	while (position == filled) {
		if (filled)
			give_back(current);
		position = filled = 0;
		if (!take_used(&receive, &current, &filled))
			return false;
		if (!filled)
			give_back(current);
	}
	return true;
}

uint8_t virtio_console_read(void)
{
	return receive_buffers[current][position++];
}
