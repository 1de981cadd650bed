# Each target sets up .venv by itself. `make check` is what must pass before a merge.
SHELL := bash
PYTHON := set -e; source scripts/setup.sh; setup dev; .venv/bin/python
.PHONY: test check slow demo bench model test-interop

check: ; scripts/test
test:  ; scripts/test -n 2 --dist loadfile --no-loadscope-reorder
slow:  ; scripts/test -m slow
test-interop: ; scripts/test-interop
demo:  ; scripts/demo
bench: ; $(PYTHON) -c ''; for bench in scripts/bench_*.py; do .venv/bin/python "$$bench"; done
model: ; $(PYTHON) scripts/build_demo_model.py
