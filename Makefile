# Every target makes .venv by itself when it is missing or older than what it is made from.
# For another torch: make setup TORCH=2.12.0. TORCH may be anything that pip accepts, such as a path to a wheel.

TORCH ?= 2.13.0
PYTHON ?= python3
# If TORCH is given, test-short creates a separate environment for it, and leaves .venv as it is.
VENV := .venv$(if $(filter test-short,$(MAKECMDGOALS)),$(if $(filter file,$(origin TORCH)),,-$(subst ==,-,$(notdir $(TORCH)))))
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
PINS := $(VENV)/constraints.txt
# A bare version number means that version of torch.
TORCH_FOR_PIP := $(if $(filter 0% 1% 2% 3% 4% 5% 6% 7% 8% 9%,$(TORCH)),torch==$(TORCH),$(TORCH))

# The tests whose outcome could depend on how a processor sums and takes roots, if a verdict or bound were wrong.
SENSITIVE := tests/patching/test_proof.py tests/test_properties.py tests/test_reference.py
VERDICTS := $(patsubst %,tests/patching/test_%.py,prove verdicts gated_norms torch_norm)

.PHONY: setup report test test-compiled test-gpu-code test-short test-processors test-sanitizers test-integrations test-wheel test-mutants check audit bench tables docs test-gpu

setup: $(STAMP)

report: $(STAMP)
	$(BIN)/rmsnorm report

bench: $(STAMP)
	$(BIN)/rmsnorm bench

# The tables of README.md and docs/, and the figures, from the stored results, and docs/founding-document.md.
tables: $(STAMP)
	$(BIN)/python benchmarks/tables.py
	for device in cuda cpu; do \
		$(BIN)/rmsnorm bench --from benchmarks/results/bench-$$device.json \
			--plot benchmarks/results/bench-$$device.svg > /dev/null || exit 1; \
	done
	$(BIN)/python benchmarks/founding_document.py

# The site, from the documents and the docstrings, into build/site. A warning, such as of a link to nothing, is an error.
docs: .venv-docs/.complete
	.venv-docs/bin/python -m sphinx -q -W --keep-going -E -c docs -d build/doctrees . build/site
	@echo "open build/site/index.html"

# In so many processes, which mostly wait for others that tests start.
WORKERS ?= 2
# Several processes share the processors, so an idle OpenMP thread must not keep one busy.
test test-compiled test-gpu-code test-mutants test-short test-processors test-integrations: export OMP_WAIT_POLICY := passive

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not compiled and not gpu_code" --ignore tests/integrations

# The tests that compile models, which take minutes.
test-compiled: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m compiled --ignore tests/integrations

# The tests that interpret GPU kernels, or compile them and read the machine code; none of them needs a GPU. By file,
# because all tests of the interpreter share one run of it.
test-gpu-code: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m gpu_code tests/kernels

# Makes the code wrong in each of the ways that tests/mutants/mutants.py lists, and checks that tests notice.
test-mutants: $(STAMP)
	$(BIN)/python tests/mutants/runner.py

# The tests marked `short`, which show within a minute whether the package works with another torch.
test-short: $(STAMP)
	$(BIN)/python -c 'import torch; print("torch", torch.__version__)'
	$(BIN)/python -m pytest -q -m short $$(grep -rl --include='test_*.py' 'pytest\.mark\.short' tests)

# torch's vector code for less capable processors than this one; all verdicts only with that which differs most.
test-processors: $(STAMP)
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not compiled" $(SENSITIVE) $(VERDICTS)
	ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not compiled" $(SENSITIVE)

# host.cpp, compiled with AddressSanitizer, UBSan and ThreadSanitizer. Skipped where the compiler has no such runtime.
test-sanitizers: $(STAMP)
	$(BIN)/python tests/kernels/sanitizers.py

# The adapters to other libraries, with the libraries themselves. Each environment adds to .venv what a file in
# tests/integrations names; its tests run in a process for each file (5: no tests, all were skipped).
INTEGRATIONS := engines hub transformers-4.46 triton-3.6

test-integrations: $(INTEGRATIONS:%=.venv-%/.complete)
	for name in $(INTEGRATIONS); do \
		for file in $$(sed -n 's/^# tests: //p' tests/integrations/$$name.txt); do \
			.venv-$$name/bin/python -m pytest -q --disable-warnings tests/integrations/$$file.py \
				|| [ $$? = 5 ] || exit 1; \
		done; \
	done

# The sdist and the wheel: built, compared with what git tracks, and tested without this environment's other packages.
test-wheel: $(STAMP) .venv-build/.complete
	$(BIN)/python tests/wheel/runner.py .venv-build/bin/python

test-gpu: $(STAMP)
	$(BIN)/rmsnorm verify --device cuda
	$(BIN)/python tests/kernels/gpu_check.py
	$(BIN)/python tests/costs/gpu_cost_check.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Known vulnerabilities of the versions in constraints.txt. Where the advisories cannot be read, that is printed.
audit: .venv-audit/.complete
	@grep -v '^#' constraints.txt | sed 's/;.*//' > .venv-audit/pins.txt
	@.venv-audit/bin/pip-audit --no-deps --disable-pip -r .venv-audit/pins.txt > .venv-audit/found.txt 2> .venv-audit/log.txt; \
		code=$$?; cat .venv-audit/found.txt; tail -n 3 .venv-audit/log.txt; \
		echo "$$(grep -c 'could not be audited' .venv-audit/found.txt) packages could not be audited"; \
		grep -q 'No known\|Found [0-9]' .venv-audit/log.txt .venv-audit/found.txt && exit $$code; \
		echo "not audited: pip-audit cannot read the advisories here"

.venv-audit/.complete:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install -q pip-audit
	@touch $@

.venv-build/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-build
	.venv-build/bin/python -m pip install -q hatchling -c constraints.txt
	@touch $@

# torch comes first and alone, because which build of it is right depends on the machine; it brings its own Triton
# where it can use one. What it chose is then pinned for the rest.
$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "rmsnorm needs Python 3.11 or newer as '$(PYTHON)'; name another one with: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	grep -vE '^(torch|triton)==' constraints.txt > $(PINS)
	$(BIN)/python -m pip install "$(TORCH_FOR_PIP)" -c $(PINS)
	$(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("triton") is None)' \
		|| $(BIN)/python -m pip install "$$(grep '^triton==' constraints.txt)" -c $(PINS)
	$(BIN)/python -m pip list --format=freeze | grep -E '^(torch|triton)==' >> $(PINS)
	$(BIN)/python -m pip install -e '.[dev]' -c $(PINS)
	@touch $@

# Makes .venv-NAME, which finds the packages of .venv through a .pth file, and its own before those.
define ADD_TO_VENV
	$(PYTHON) -m venv --clear .venv-$(1)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$(.venv-$(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	.venv-$(1)/bin/python -m pip install -q --no-deps -e .
endef

.venv-docs/.complete: $(STAMP) docs/requirements.txt
	$(call ADD_TO_VENV,docs)
	.venv-docs/bin/python -m pip install -q --no-deps -r docs/requirements.txt
	@touch $@

# If a package cannot be installed, its name is printed, its tests are skipped, and the next run tries again.
$(INTEGRATIONS:%=.venv-%/.complete): .venv-%/.complete: $(STAMP) tests/integrations/%.txt
	$(call ADD_TO_VENV,$*)
	if .venv-$*/bin/python -m pip install -q --no-deps -r tests/integrations/$*.txt; then \
		touch $@; \
	else \
		grep -oE '^[^#]+==[^ ]+' tests/integrations/$*.txt | while read -r package; do \
			.venv-$*/bin/python -m pip install -q --no-deps "$$package" || echo "could not install $$package"; \
		done; \
	fi
