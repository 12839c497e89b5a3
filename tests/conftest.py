"""Eight emulated CPU devices, and strictness: rank promotion raises, warnings are errors."""

import gc
import os
from pathlib import Path

# Set before jax is imported: a machine with an accelerator runs the suite on its CPU too.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
# The tests spend their time compiling programs that run for microseconds: the same HLO without
# LLVM's optimisation compiles twice as fast, and a third faster again by the emitters of old,
# which open no MLIR context for each fusion. And eight devices share few threads: independent
# collectives of one program, begun in another order on each device, can take them all and wait
# for ever.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
    " --xla_cpu_enable_concurrency_optimized_scheduler=false",
)

import jax
import pytest

# Tracing makes many objects that stay: searching them for garbage took a twelfth of the time.
gc.set_threshold(50_000, 20, 20)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs are kept between runs, beside pytest's own cache."""
    cache = config.cache
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Small real data sets beside the repository; tests that use them skip where they are not."""
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not data.is_dir():
        pytest.skip(f"no real data sets at {data}")
    return data


@pytest.fixture(scope="session")
def real_model() -> Path:
    """A directory with a pretrained chat model and its tokenizer, such as SmolLM2-135M-Instruct."""
    directory = os.environ.get("INSTRUCTJAX_REAL_MODEL")
    if not directory:
        pytest.skip("INSTRUCTJAX_REAL_MODEL names no directory with a pretrained chat model")
    return Path(directory)
