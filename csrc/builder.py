"""Builds the extension ``layalign._C``, and the programs that check its kernels, with ninja.

``setup.py`` uses it for installations; by hand:

    python csrc/builder.py extension --output DIR        # _C, as an installation has it
    python csrc/builder.py emulated --output DIR         # _C_emulated: the CUDA kernels as C++, run on CPU tensors
    python csrc/builder.py check --output DIR            # cpu_check, cuda_check, ptx_check with the sanitizers;
                                                         # cuda_shared_check, which watches shared memory
    python csrc/builder.py ptx --output DIR              # ptx_check for a GPU, by nvcc; emulated where there is none
    python csrc/builder.py ptxas --output DIR            # CUDA objects only; prints registers, spills, shared memory

Environment: CXX, CUDA_HOME, LAYALIGN_CUDA (0, 1 or unset: if a toolkit is there), LAYALIGN_CUDA_ARCHS ("80;90"),
LAYALIGN_WERROR (1: warnings are errors), MAX_JOBS.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARCHS = ("80", "90", "100")  # machine code for these, and PTX of the newest for what comes after
X86 = ("x86_64", "amd64")
ISA_FLAGS = {
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mbmi -mprefer-vector-width=512",
    "avx2": "-mavx2 -mfma -mf16c -mbmi",
    "baseline": "",
    "neon": "",
}
# Infinities and NaN keep their meaning; only what nobody can see (errno, traps) is given up.
CPP_FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast"
# Emulated kernels. The sanitizer's calls before each access go to emulate.cpp; its library is not linked.
KERNEL_FLAGS = {"emulate": "-O2", "watch": "-O1 -fsanitize=thread"}
WARNINGS = "-Wall -Wextra -Wshadow"


class BuildError(RuntimeError):
    """The extension cannot be built; the text says why in one line."""


@dataclass
class Plan:
    """What is compiled and how; ``notes`` says in a line each what is built and what is not, and why."""

    objects: list[tuple[str, Path, str]] = field(default_factory=list)  # (rule, source, extra flags)
    defines: list[str] = field(default_factory=list)
    link_with_nvcc: bool = False
    notes: dict[str, str] = field(default_factory=dict)


def compiler() -> str:
    """The C++ compiler: CXX, else g++, clang++ or c++."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++", "c++"]:
        found = shutil.which(name.split()[0])
        if found:
            return " ".join([found, *name.split()[1:]])
    raise BuildError(f"CXX={named} is not a program here" if named else "no C++ compiler (g++, clang++) on the PATH")


def nvcc() -> str:
    """CUDA's compiler: under CUDA_HOME or CUDA_PATH, else on the PATH, else in /usr/local/cuda."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [str(Path(home) / "bin" / "nvcc") for home in homes] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for place in places:
        found = shutil.which(place)
        if found:
            return found
    raise BuildError("no CUDA toolkit: nvcc is neither under CUDA_HOME nor on the PATH")


def cuda_archs(tool: str) -> list[str]:
    """The architectures to compile for: LAYALIGN_CUDA_ARCHS, else those of ARCHS that this nvcc knows."""
    listing = subprocess.run([tool, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    known = re.findall(r"compute_(\d+)", listing)
    asked = re.findall(r"\d+", os.environ.get("LAYALIGN_CUDA_ARCHS", ""))
    if asked and not set(asked) <= set(known):
        raise BuildError(f"LAYALIGN_CUDA_ARCHS: this nvcc knows {', '.join(known)}, not {', '.join(asked)}")
    archs = asked or [arch for arch in ARCHS if arch in known]
    if not archs or min(int(arch) for arch in archs) < 80:
        raise BuildError(f"the CUDA kernels need architecture 80 or newer; nvcc offers {', '.join(known) or 'none'}")
    return sorted(archs, key=int)


def pybind11_include() -> str:
    """pybind11's headers: its own package, else the copy inside an installed torch."""
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        return str(pybind11.get_include())
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.submodule_search_locations:
        include = Path(torch.submodule_search_locations[0]) / "include"
        if (include / "pybind11" / "pybind11.h").is_file():
            return str(include)
    raise BuildError("the package pybind11 is not installed")


def ninja() -> str:
    """The ninja program: on the PATH, or in the package of that name."""
    found = shutil.which("ninja")
    if found:
        return found
    if importlib.util.find_spec("ninja") is not None:
        import ninja as package

        return str(Path(package.BIN_DIR) / "ninja")
    raise BuildError("ninja is not installed")


def version() -> str:
    """The package's version, which the module carries so that an outdated one is noticed."""
    text = (HERE.parent / "layalign" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert found is not None
    return found.group(1)


def add_cpu(plan: Plan, machine: str) -> None:
    """The C++ kernels, each file once per instruction set."""
    if machine in X86:
        sets = ["baseline", "avx2", "avx512"]
    elif machine in ("aarch64", "arm64"):
        sets = ["neon"]
    else:
        sets = ["baseline"]
    once = {"dispatch.cpp", "parallel.cpp"}
    for source in sorted((HERE / "cpu").glob("*.cpp")):
        for isa in [None] if source.name in once else sets:
            plan.objects.append(("cxx", source, "" if isa is None else f"-DLAYALIGN_ISA={isa} {ISA_FLAGS[isa]}"))
    plan.defines += [f"-DLAYALIGN_HAVE_{isa.upper()}" for isa in sets]
    plan.notes["cpp"] = f"built for {machine}: {', '.join(reversed(sets))}"


def add_cuda(plan: Plan, wanted: str) -> None:
    """The CUDA kernels.

    ``wanted``: "0", "1" (raise if it cannot be), "emulate", "watch" (emulate, and watch shared memory), or "" (if a
    toolkit is there).
    """
    sources = sorted((HERE / "cuda").glob("*.cu"))
    if wanted in ("emulate", "watch"):
        plan.objects += [("cxx", source, f"-x c++ {KERNEL_FLAGS[wanted]}") for source in sources]
        plan.objects.append(("cxx", HERE / "cuda" / "emulate.cpp", "-O2"))
        plan.defines += ["-DLAYALIGN_HAVE_CUDA", "-DLAYALIGN_EMULATE_CUDA"]
        if wanted == "watch":
            plan.defines.append("-DLAYALIGN_WATCH_SHARED")
        plan.notes["cuda"] = "emulated on the CPU, for tests"
        return
    if wanted == "0":
        plan.notes["cuda"] = "not built: LAYALIGN_CUDA=0"
        return
    try:
        tool = nvcc()
        archs = cuda_archs(tool)
    except BuildError as error:
        if wanted == "1":
            raise
        plan.notes["cuda"] = f"not built: {error}"
        return
    plan.objects += [("nvcc", source, "") for source in sources]
    plan.defines.append("-DLAYALIGN_HAVE_CUDA")
    plan.link_with_nvcc = True
    plan.notes["cuda"] = f"built by {tool} for sm_{', sm_'.join(archs)} and PTX of {archs[-1]}"


def gencode(archs: list[str]) -> str:
    """nvcc's flags: machine code for each architecture, and PTX of the last."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join([*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"])


def run_ninja(plan: Plan, target: Path, folder: Path, flags: str, shared: bool, nvcc_flags: str = "") -> None:
    """Write ``folder``/build.ninja for the plan, run it, and leave the result at ``target``."""
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    cxx = compiler()
    errors = " -Werror" if os.environ.get("LAYALIGN_WERROR", "0") not in ("", "0") else ""
    cpp_flags = f"{CPP_FLAGS} {WARNINGS}{errors} -I{HERE} {' '.join(plan.defines)} {flags}"
    lines = [
        "ninja_required_version = 1.3",
        "rule cxx",
        f"  command = {cxx} -MD -MF $out.d {cpp_flags} $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $name",
    ]
    linker = f"{cxx} {flags}" + (" -shared" if shared and sys.platform != "darwin" else "")
    if shared and sys.platform == "darwin":
        linker += " -bundle -undefined dynamic_lookup"
    libraries = "-ldl -lpthread" if sys.platform.startswith("linux") else ""
    if any(rule == "nvcc" for rule, *_ in plan.objects):
        tool = nvcc()
        strict = " -Werror all-warnings" if errors else ""
        host = f"-ccbin {cxx.split()[0]} -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"
        lines += [
            "rule nvcc",
            f"  command = {tool} -MD -MF $out.d -std=c++17 -O3{strict} {gencode(cuda_archs(tool))} {host} -I{HERE} "
            f"{' '.join(plan.defines)} {nvcc_flags} $extra -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $name",
        ]
        if plan.link_with_nvcc:
            # cudart inside: the module loads where there is no driver and no toolkit.
            linker = f"{tool} -ccbin {cxx.split()[0]}{' -shared' if shared else ''} -cudart static"
    lines += ["rule link", f"  command = {linker} $in -o $out {libraries}", "  description = link $out"]
    outputs = []
    # The slow ones first: nvcc's work bounds the time of the whole.
    for rule, source, extra in sorted(plan.objects, key=lambda entry: (entry[0] != "nvcc", -entry[1].stat().st_size)):
        isa = re.search(r"LAYALIGN_ISA=(\w+)", extra)
        name = source.name + (f".{isa.group(1)}" if isa else "")
        optimise = "" if "-O" in extra or "-O" in flags or rule == "nvcc" else "-O3 "
        out = folder / f"{source.parent.name}.{name}.o"
        lines += [f"build {_escape(out)}: {rule} {_escape(source)}", f"  extra = {optimise}{extra}", f"  name = {name}"]
        outputs.append(_escape(out))
    lines += [f"build {_escape(target)}: link {' '.join(outputs)}", f"default {_escape(target)}", ""]
    (folder / "build.ninja").write_text("\n".join(lines), encoding="utf-8")
    jobs = os.environ.get("MAX_JOBS")
    done = subprocess.run(
        [ninja(), "-C", str(folder), *(["-j", jobs] if jobs else [])], capture_output=True, text=True, check=False
    )
    (folder / "build.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode != 0:
        raise BuildError(f"compilation failed; the end of {folder / 'build.log'}:\n{done.stdout[-3000:]}")


def _escape(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def extension(target: Path, folder: Path, cuda: str, flags: str = "", module: str = "_C") -> dict[str, str]:
    """Build the Python module at ``target``; returns what was built and what not, by backend.

    Raises:
        BuildError: a compiler, ninja or pybind11 is missing, compilation failed, or CUDA was demanded and is not here.
    """
    plan = Plan()
    add_cpu(plan, platform.machine().lower())
    add_cuda(plan, cuda)
    # Only for the binding: an isolated build finds pybind11 elsewhere every time, and the kernels need not know.
    python = f"-isystem {pybind11_include()} -isystem {sysconfig.get_paths()['include']}"
    flag = f"-O2 {python} -DLAYALIGN_MODULE={module} -DLAYALIGN_VERSION={version()}"
    plan.objects += [("cxx", source, flag) for source in sorted(HERE.glob("*.cpp"))]
    run_ninja(plan, target, folder, flags, shared=True)
    # A shared object links with symbols missing; this finds them now and not at somebody's import.
    probe = "import ctypes, os, sys; ctypes.CDLL(sys.argv[1], os.RTLD_NOW)"
    done = subprocess.run([sys.executable, "-c", probe, str(target)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        target.unlink()
        raise BuildError(f"the module does not load: {done.stderr.strip().splitlines()[-1]}")
    return plan.notes


def check_programs(folder: Path, sanitize: bool, machine: str = "") -> list[Path]:
    """Build cpu_check, and with the emulated CUDA kernels cuda_check, cuda_shared_check, ptx_check; returns them."""
    flags = "-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all" if sanitize else "-O2"
    programs = []
    for name in ("cpu_check", "cuda_check", "cuda_shared_check"):
        plan = Plan()
        if name == "cpu_check":
            add_cpu(plan, machine or platform.machine().lower())
            plan.objects.append(("cxx", HERE / "tests" / "cpu_check.cpp", ""))
        else:
            mode = "emulate" if name == "cuda_check" else "watch"
            add_cuda(plan, mode)
            plan.objects.append(("cxx", HERE / "tests" / "probes.cpp", KERNEL_FLAGS[mode]))
            plan.objects.append(("cxx", HERE / "tests" / "cuda_check.cpp", ""))
        own = "-O2" if name == "cuda_shared_check" else flags  # two sanitizers do not go together
        run_ninja(plan, folder / name, folder / f"{name}.objects", own, shared=False)
        programs.append(folder / name)
    programs.append(ptx_program(folder, "emulate", flags)[0])
    return programs


def ptx_program(folder: Path, cuda: str, flags: str = "-O2") -> tuple[Path, str]:
    """Build ptx_check; returns it and what it was built for. ``cuda``: as for :func:`add_cuda`, "" and "0" emulate."""
    plan = Plan(objects=[("nvcc", HERE / "tests" / "ptx_check.cu", "")], link_with_nvcc=True)
    try:
        if cuda in ("0", "emulate"):
            raise BuildError("not asked for")
        tool = nvcc()
        note = f"built by {tool} for sm_{', sm_'.join(cuda_archs(tool))}"
    except BuildError as error:
        if cuda == "1":
            raise
        note = f"emulated on the CPU: {error}"
        plan = Plan(defines=["-DLAYALIGN_EMULATE_CUDA"])
        plan.objects = [("cxx", HERE / "tests" / "ptx_check.cu", "-x c++"), ("cxx", HERE / "cuda" / "emulate.cpp", "")]
    run_ninja(plan, folder / "ptx_check", folder / "ptx_check.objects", flags, shared=False)
    return folder / "ptx_check", note


def main() -> None:
    """Build what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["extension", "emulated", "check", "ptx"])
    parser.add_argument("--output", type=Path, required=True, help="folder for the result and the objects")
    parser.add_argument("--plain", action="store_true", help="check programs without the sanitizers")
    parser.add_argument("--machine", default="", help="check: machine that CXX compiles for, e.g. aarch64")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if arguments.what == "check":
        for program in check_programs(output, not arguments.plain, arguments.machine):
            print(program)
        return
    if arguments.what == "ptx":
        print(*ptx_program(output, os.environ.get("LAYALIGN_CUDA", "")), sep=": ")
        return
    if arguments.what == "emulated":
        notes = extension(output / f"_C_emulated{suffix}", output / "emulated.objects", "emulate", module="_C_emulated")
    else:
        notes = extension(output / f"_C{suffix}", output / "objects", os.environ.get("LAYALIGN_CUDA", ""))
    for backend, note in notes.items():
        print(f"{backend}: {note}")


if __name__ == "__main__":
    try:
        main()
    except BuildError as error:
        sys.exit(f"build: {error}")
