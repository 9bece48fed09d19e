"""Builds host.cpp with sanitizers, and runs the tests of its calls: AddressSanitizer with UBSan, then ThreadSanitizer.

    python tests/kernels/sanitizers.py [address] [thread]

The libraries are kept in build/sanitizers. Exits with 1 if a sanitizer reports anything or a test fails. If a runtime
of a sanitizer is missing, its tests are skipped, which is printed.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "sanitizers"
# Of tests/kernels/test_host.py: the tests of the plan cache and of threads, which both sanitizers run; and the others that
# call the C++, but not those that compile it again in other processes.
THREADED = (
    "cpp_requests_a_plan_once_for_each_kind_of_call",
    "results_stay_right_when_the_plan_cache_overflows",
    "threads_share_the_rows_of_a_call_from_cpp",
    "concurrent_calls_from_many_threads_are_right",
    "the_plan_cache_is_right_while_threads_fill_clear_and_count_it",
)
CALLS = (
    "calls_from_cpp_have_the_bits_of_calls_from_python",
    "calls_that_need_a_conversion_are_made_by_python",
    "calls_that_differ_in_any_relevant_property_get_separate_plans",
    "invalid_arguments_are_left_to_python",
    "unaligned_tensors_get_their_own_plan",
    "calls_with_anything_but_plain_tensors_are_made_by_python",
    "arguments_are_checked_after_the_plan_is_cached",
    "the_backward_pass_runs_without_python",
    "only_requested_gradients_are_computed",
    "gradients_are_right_if_only_one_output_is_used",
    "gradients_have_the_dtypes_of_their_inputs",
    "a_second_derivative_raises",
    "saved_tensors_that_were_freed_or_modified_raise",
    "cotangents_of_every_kind_give_the_gradients_of_python",
    "batched_cotangents_saved_tensor_hooks_and_checkpointing_work",
    "a_python_error_in_the_backward_pass_is_raised_unchanged",
    "no_tensor_of_a_call_is_kept_alive",
    "a_hook_that_raises_while_tensors_are_saved_keeps_nothing_alive",
    "a_plan_keeps_its_machine_code_alive",
    "a_gpu_launch_passes_the_right_arguments_to_the_driver",
    "an_invalid_plan_raises",
)


@dataclass(frozen=True)
class Sanitizer:
    """A sanitizer and how it is used.

    flags: for the compiler. runtime: the library that must be loaded first. trace: a symbol of an instrumented library.
    options: environment variables.
    """

    name: str
    flags: tuple[str, ...]
    runtime: str
    trace: bytes
    options: dict[str, str]
    tests: tuple[str, ...]


_ALWAYS = ("-O1", "-g1", "-fno-omit-frame-pointer")
SANITIZERS = (
    Sanitizer(
        "address",
        # Not vptr: it needs the type information of torch's classes, which torch's libraries do not export.
        (*_ALWAYS, "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"),
        "libasan.so",
        b"__asan_init",
        # Python and torch keep memory until the process ends, which is no leak.
        {"ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"},
        THREADED + CALLS,
    ),
    Sanitizer(
        "thread",
        (*_ALWAYS, "-fsanitize=thread"),
        "libtsan.so",
        b"__tsan_init",
        # Only accesses by host.cpp count: how torch's and OpenMP's threads wait for each other is not seen.
        {"TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1"},
        THREADED,
    ),
)


def runtime(compiler: list[str], name: str) -> str | None:
    """The path of a sanitizer's library; None if the compiler has none."""
    found = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    path = found.stdout.strip()
    return path if found.returncode == 0 and os.path.isabs(path) else None


def build(sanitizer: Sanitizer, compiler: list[str]) -> dict[str, str]:
    """Compile host.cpp with the sanitizer; return the environment in which the package loads that library."""
    key = hashlib.sha256(repr((compiler, sanitizer.flags)).encode()).hexdigest()[:8]
    folder = FOLDER / f"{sanitizer.name}-{key}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    wrapper = folder / "cxx"  # so that our flags come after those of the package, such as -O2
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(compiler)} "$@" {shlex.join(sanitizer.flags)}\n')
    wrapper.chmod(0o700)
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(folder), "RMSNORM_CXX": shlex.quote(str(wrapper))}
    code = "from rmsnorm.kernels.host import loader; print(loader.built())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"host.cpp could not be compiled with {sanitizer.name}:\n{done.stderr}")
    library = Path(done.stdout.split()[-1])
    if sanitizer.trace not in library.read_bytes():
        sys.exit(f"{library} has no {sanitizer.trace.decode()}: the compiler ignored {shlex.join(sanitizer.flags)}")
    return environment


def run(sanitizer: Sanitizer) -> bool:
    """Build, and run the tests. Returns whether all is right, or was skipped."""
    compiler = shlex.split(os.environ.get("RMSNORM_CXX") or os.environ.get("CXX") or "c++")
    library = runtime(compiler, sanitizer.runtime) if shutil.which(compiler[0]) else None
    if library is None:
        print(f"skipped: {shlex.join(compiler)} has no {sanitizer.runtime}", flush=True)
        return True
    # The runtime looks for the function that throws exceptions when it starts, before torch loads the standard library.
    preloaded = f"{library} {runtime(compiler, 'libstdc++.so.6') or ''}"
    environment = build(sanitizer, compiler) | {"LD_PRELOAD": preloaded.strip(), **sanitizer.options}
    reports = Path(environment["TORCH_EXTENSIONS_DIR"]) / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    for variable in sanitizer.options:  # into files, since pytest captures standard error
        environment[variable] += f":log_path={reports / 'report'}"
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []  # some addresses of a random layout confuse TSan
    names = [f"tests/kernels/test_host.py::test_{name}" for name in sanitizer.tests]
    command = [*fixed, sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *names]
    print(f"{sanitizer.name}: {len(names)} tests of host.cpp with {shlex.join(sanitizer.flags)}", flush=True)
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    # Where the C++ cannot be loaded, the tests are skipped: then nothing was tested.
    passed = done.returncode == 0 and re.search(r"^\d+ passed in", done.stdout, re.MULTILINE) is not None
    reported = sorted(reports.iterdir())
    for report in reported:
        print(report.read_text(errors="replace"), flush=True)
    return passed and not reported


def main() -> int:
    wanted = sys.argv[1:] or [s.name for s in SANITIZERS]
    if unknown := set(wanted) - {s.name for s in SANITIZERS}:
        sys.exit(f"sanitizers.py: {sorted(unknown)} are no sanitizers: give {' or '.join(s.name for s in SANITIZERS)}")
    return int(not all(run(s) for s in SANITIZERS if s.name in wanted))


if __name__ == "__main__":
    sys.exit(main())
