# Each target brings what it needs: Debian packages, the virtual environment .venv, the monitor.
# `make help` lists them. V=1 shows the commands, ARGS="..." goes to what is started.

MAKEFLAGS += --no-builtin-rules --no-print-directory

JOBS ?= 2
export V
# The suite starts Python some hundred times, which without compiled modules takes twice as long.
unexport PYTHONDONTWRITEBYTECODE

ifneq ($(V),1)
Q := @
QUIET := -s
endif

.DEFAULT_GOAL := help

setup: guest ## install what is missing, make .venv, build the monitor
	@echo "vmxlab is set up. Next: make run, make test"

run: guest ## boot a first case and show what it did
	$(Q).venv/bin/vmxlab run $(ARGS)

test: guest iso-tools browser ## the suite, less the tests that are marked slow
	$(Q).venv/bin/pytest -n $(JOBS) -m "not slow" $(ARGS)

test-all: guest iso-tools browser ## the whole suite: what CI runs
	$(Q).venv/bin/pytest -n $(JOBS) $(ARGS)

# The page is made of what did run, also where tests failed or the session was stopped.
report: guest iso-tools browser ## the whole suite, or what ARGS names, and what it did as one HTML file: build/report.html
	$(Q)rm -f build/results.jsonl build/report.html; status=0; \
	.venv/bin/pytest -n $(JOBS) --vmx-results build/results.jsonl $(ARGS) || status=$$?; \
	.venv/bin/vmxlab report build/results.jsonl -o build/report.html || exit $$?; \
	exit $$status

test-kvm: guest ## the exit tests on QEMU/KVM with nested VMX: this host's, or else KVM inside Bochs
	$(Q).venv/bin/pytest -n $(JOBS) --vmx-engine auto-kvm tests/exits $(ARGS)

test-oracle: guest ## the exit tests on bochs, each run checked by the oracle as well
	$(Q).venv/bin/pytest -n $(JOBS) --vmx-engine bochs --vmx-oracle tests/exits $(ARGS)

# Eight property tests share the N cases.
fuzz: guest ## N=10000 generated cases on bochs against the oracle; SEED=1 others
	$(Q).venv/bin/pytest -n $(JOBS) --vmx-engine bochs tests/properties \
		--vmx-examples $$(( ($(or $(N),10000) + 7) / 8 )) --vmx-seed $(or $(SEED),0) --timeout 0 $(ARGS)

# Thousands of cases that show no exit reason besides those of other tests: minutes on kvm-in-bochs.
MANY_CASES = $(addprefix tests/exits/,translation test_sweep.py \
	test_vm_entry_rules.py test_vm_entry_rules_everywhere.py test_vm_entry_generated.py)

coverage: guest ## which exit reasons the tests see on bochs and kvm-in-bochs, into docs/coverage.md
	$(Q)mkdir -p docs
	$(Q).venv/bin/pytest -n $(JOBS) --vmx-engine bochs --vmx-coverage build/coverage.bochs.jsonl tests/exits $(ARGS)
	$(Q).venv/bin/pytest -n $(JOBS) --vmx-engine kvm-in-bochs --vmx-coverage build/coverage.kvm.jsonl tests/exits \
		$(addprefix --ignore ,$(MANY_CASES)) $(ARGS)
	$(Q).venv/bin/vmxlab coverage build/coverage.*.jsonl --markdown > build/coverage.md; test $$? -le 1
	$(Q)mv build/coverage.md docs/coverage.md
	$(Q).venv/bin/vmxlab coverage build/coverage.*.jsonl --minimum bochs=55,kvm-in-bochs=45

docs: environment ## the pages that are made from the code, into docs/
	$(Q).venv/bin/python -m vmxlab.reports.entry_rules_page > docs/vm-entry-rules.md

console: guest ## the monitor's prompt
	$(Q).venv/bin/vmxlab console $(ARGS)

shell: guest ## a Python prompt with a live machine
	$(Q).venv/bin/vmxlab shell $(ARGS)

image: guest ## write an image that boots on every engine, build/vmxlab.*
	$(Q).venv/bin/vmxlab image -o build/vmxlab $(ARGS)

iso: guest iso-tools ## write an ISO that boots on a PC, build/vmxlab.iso
	$(Q).venv/bin/vmxlab image --format iso -o build/vmxlab $(ARGS)

carrier: guest ## build what the engine kvm-in-bochs boots, and say what is in it
	$(Q).venv/bin/vmxlab carrier $(ARGS)

bench: guest ## measure, as ratios where the machine's speed matters
	$(Q).venv/bin/python tests/bench/run.py $(ARGS)

wheel: guest ## an installable package with the monitor inside, into dist/
	$(Q)mkdir -p harness/vmxlab/monitor
	$(Q)cp $(addprefix build/guest/,monitor.elf monitor.elf.64 reset.bin carrier.bin carrier-init) harness/vmxlab/monitor/
	$(Q).venv/bin/pip wheel -q --no-deps -w dist .

lint: ## ruff, mypy, clang-format: all of them, whichever fails
	$(Q)tools/setup.sh run lint
	$(Q)status=0; \
	.venv/bin/ruff check . || status=1; \
	.venv/bin/ruff format --check . || status=1; \
	.venv/bin/mypy || status=1; \
	find guest -name '*.[ch]' -exec clang-format --dry-run --Werror {} + || status=1; \
	exit $$status

environment:
	$(Q)tools/setup.sh run

# The tests of the HTML report look at it in one; where there is none they are skipped, and say so.
browser: environment
	$(Q)tools/setup.sh test

iso-tools:
	$(Q)tools/setup.sh run iso

# Locked, so that two suites started at once in one checkout don't build into each other.
guest: environment ## build the monitor into build/guest
	$(Q)flock build/guest.lock $(MAKE) $(QUIET) -C guest OUT=../build/guest PYTHON=../.venv/bin/python

clean: ## remove what was built, the logs and the caches; .venv stays
	$(Q)rm -rf build dist logs harness/vmxlab/monitor .pytest_cache .mypy_cache .ruff_cache .hypothesis
	$(Q)find harness tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	$(Q)rm -rf .venv harness/vmxlab.egg-info

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

.PHONY: setup run test test-all report test-kvm test-oracle fuzz coverage docs console shell image iso carrier bench wheel lint environment iso-tools browser guest clean distclean help
