# make demo     search, stage 1, stage 2 and a result table on an embedded set of images, in minutes
# make test     all tests but those of test-sanitizers
# make test-oldest  the same with the oldest supported versions of all requirements; TESTS="FILES" of them alone
# make test-sanitizers  every path of the kernels, compiled with address and undefined-behaviour sanitizers
# make test-arm the packed kernel of 64-bit ARM, NEON and plain C, under qemu: the tests of a path, and sanitizers
# make wasm     the packed kernel for the browser, web/kernel.wasm: needs clang and lld
# make lint     ruff
# PYTHON=...    use the environment of that interpreter, instead of setting one up in .venv

ifdef PYTHON
SETUP :=
else
PYTHON := .venv/bin/python
SETUP := .venv/ready
endif

# small images and small networks; the real commands are in README.md
SHAPES := --set shapes --image_size 16 --save demo --seed 0 --layers 3 --learning_rate 3e-3 --report_freq 50
SEARCH := $(SHAPES) --batch_size 100 --init_channels 8 --arch_learning_rate 1e-2
NETWORK := $(SHAPES) --batch_size 50 --init_channels 14 --drop_path_prob 0

TESTS := tests
OLDEST := .venv-oldest

.PHONY: demo test test-oldest test-sanitizers test-arm wasm lint clean

demo: export OMP_NUM_THREADS = 2
demo: $(SETUP)
	$(PYTHON) train_search.py $(SEARCH) --epochs 2
	$(PYTHON) train.py $(NETWORK) --epochs 2 --arch "$$(ls -td runs/search-demo-* | head -n 1)"
	$(PYTHON) train.py $(NETWORK) --epochs 5 --arch "$$(ls -td runs/search-demo-* | head -n 1)" --binary
	$(PYTHON) evaluate.py "$$(ls -td runs/eval-demo-stage1-* | head -n 1)" "$$(ls -td runs/eval-demo-stage2-* | head -n 1)"
	@echo; echo "pictures:"; ls "$$(ls -td runs/search-demo-* | head -n 1)"/*.png "$$(ls -td runs/eval-demo-stage2-* | head -n 1)"/*.png

# a process a core, of one thread each, that takes tests from another when it has none left
test: export OMP_NUM_THREADS = 1
test: $(SETUP)
	$(PYTHON) -m pytest -q -n auto --maxprocesses 8 --dist worksteal tests

test-oldest: export OMP_NUM_THREADS = 1
test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal $(TESTS)

test-sanitizers: export OMP_NUM_THREADS = 1
test-sanitizers: $(SETUP)
	$(PYTHON) -m pytest -q -n auto --maxprocesses 8 -m sanitizer tests

# all tests in which a kernel computes; then those of memory
test-arm: export OMP_NUM_THREADS = 1
test-arm: export PYTHONPATH = tests
test-arm: ARM := -m pytest -q -n auto --maxprocesses 8 --dist worksteal -p support.kernel_process
test-arm: SANITIZE := -O1 -fsanitize=address,undefined -fno-sanitize-recover=all
test-arm: CHOSEN := packed_kernel or random or damaged_bytes or wrong_fields or format_1
test-arm: FILES := tests/packed/test_packed_kernel.py tests/packed/test_packed_fuzz.py tests/packed/test_packed.py
test-arm: $(SETUP)
	$(PYTHON) $(ARM) $(FILES) -k "($(CHOSEN) or the_float_form or disturb or 2000) and not sanitizers"
	EBNAS_CFLAGS="$(SANITIZE)" ASAN_OPTIONS=detect_leaks=0 \
		$(PYTHON) $(ARM) $(FILES) -k "($(CHOSEN)) and not sanitizers"

# the committed file is what clang and lld 14 give; __FILE__, which the source includes, is found by -I
WASM := web/kernel.wasm
wasm:
	clang --target=wasm32 -O3 -ffreestanding -nostdlib -msimd128 -mbulk-memory -I. -Wl,--no-entry,--strip-all \
	    -Wl,--export=best_path,--export=encode_weights,--export=run_network,--export=__heap_base \
	    -o $(WASM) packed/binary_cpu.c

lint: $(SETUP)
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .

.venv/ready: requirements.txt requirements-dev.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install -q -r requirements-dev.txt
	touch .venv/ready

$(OLDEST)/ready: requirements-oldest.txt
	python3 -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --no-compile -r requirements-oldest.txt
	touch $(OLDEST)/ready

clean:
	rm -rf .venv $(OLDEST) .pytest_cache .ruff_cache
