/*
 * The monitor: says what it is and what the processor can do, runs the image's cases, and then offers the
 * prompt. It does what it is told and reports what it saw; it holds no expectation and gives no verdict.
 */
#include <stdint.h>

#include "boot/boot.h"
#include "console/console.h"
#include "cpu/gdt.h"
#include "cpu/heartbeat.h"
#include "cpu/pic.h"
#include "cpu/registers.h"
#include "cpu/traps.h"
#include "lib/crc.h"
#include "lib/memory.h"
#include "lib/serial.h"
#include "monitor/capability_report.h"
#include "monitor/cases.h"
#include "monitor/payload.h"
#include "monitor/records.h"
#include "protocol.h"
#include "vmx/operation.h"

#define CPUID_ADDRESS_WIDTHS 0x80000008u

const char *boot_loader_name(uint32_t magic)
{
	switch (magic) {
	case BOOT_MAGIC_ROM:
		return "rom";
	case BOOT_MAGIC_MULTIBOOT:
		return "multiboot";
	default:
		return "pvh";
	}
}

/* CPUID.0's vendor string holds no space on any processor with VMX; elsewhere the record stays readable. */
static void vendor(char text[13])
{
	struct cpuid leaf = cpuid(0);
	memcpy(text, &leaf.ebx, 4);
	memcpy(text + 4, &leaf.edx, 4);
	memcpy(text + 8, &leaf.ecx, 4);
	text[12] = 0;
	for (int i = 0; i < 12; i++)
		if (text[i] <= ' ' || text[i] > '~' || text[i] == '=' || text[i] == '*')
			text[i] = '_';
}

static void report_boot(uint32_t magic)
{
	uint32_t widths = cpuid(CPUID_ADDRESS_WIDTHS).eax;
	char name[13];
	vendor(name);
	record_begin("boot");
	record_number("protocol", PROTOCOL_VERSION);
	record_number("build", BUILD_ID);
	record_word("loader", boot_loader_name(magic));
	record_word("cpu", name);
	record_number("signature", cpuid(1).eax);
	record_number("maxphyaddr", widths & 0xff);
	record_number("linear", widths >> 8 & 0xff);
	record_number("vmx", vmx_present());
	record_end();
}

/* Called from boot/start.S. */
void monitor_main(uint32_t magic)
{
	uint32_t cases;
	heartbeat_start();
	serial_init();
	crc_init();
	gdt_init();
	traps_init();
	pic_mask_all();
	report_boot(magic);
	vmx_prepare();
	if (vmx_present())
		report_capabilities();
	cases = cases_available();
	if (cases && !payload_waits())
		cases_run(0, cases);
	console_run();
}
