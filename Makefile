# `make demo` and `make test` need nothing else to be done by hand: they make .venv if it is missing.

.PHONY: demo test lint bases clean
PYTHON_FILES := mlx_llama3v cli weights tests benchmarks

demo: .venv/.demo
	.venv/bin/llama3v-mlx demo $(ARGS)

test: .venv/.test lint
	.venv/bin/python -m pytest -n auto --dist loadfile $(ARGS)

lint: .venv/.test
	.venv/bin/ruff check $(PYTHON_FILES)
	.venv/bin/ruff format --check $(PYTHON_FILES)
	.venv/bin/mypy

# The bundled tiny bases, trained again from a seed: about an hour and a half on two cores; stop and go on as you like.
bases: .venv/.test
	.venv/bin/python -m mlx_llama3v.demo.bases_siglip --output weights/tiny/siglip
	.venv/bin/python -m mlx_llama3v.demo.bases_llama --output weights/tiny/llama

# A stamp a set of extras; the stamps are newer than pyproject.toml, so a changed one installs again.
.venv/.demo: pyproject.toml scripts/setup.sh
	@scripts/setup.sh
	@touch $@

.venv/.test: pyproject.toml scripts/setup.sh
	@scripts/setup.sh test
	@touch $@ .venv/.demo

clean:
	rm -rf .venv build *.egg-info demo-output bases-work
