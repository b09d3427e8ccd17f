"""The runner: export, the notebooks through papermill, the site through jupyter-book.

    python book/build.py book | smoke | nb NAME | status | sync [--check] | site SCALE

A notebook's run is fresh while everything that decides its outputs is as it was: its code cells, its parameters, the modules
it imports, the weights and records it names, and the notebooks that make the runs it loads. These hashes lie in the executed
notebook itself, which is put in its place only when it is complete. So a run that was cut off anywhere simply runs again.
"""
import argparse
import ast
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import tokenize
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "diffcourse"
BIN = Path(sys.executable).parent
SHIPPED = ["digits/classifier", "digits/ddpm", "digits/flow", "digits/distilled-5", "digits/compact-5", "digits/meanflow",
           "digits/one-step", "digits/flow-labels"]    # runs whose weights the package carries, 3 MB each at most
JOBS = min(2, os.cpu_count() or 1)       # notebooks at a time: two with a thread each are faster than one with two threads


def stop(message):
    sys.exit(f"{message}")


def digest(value) -> str:
    """The sha256 of bytes, or of a value as JSON."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


# ---------------------------------------------------------------- what a notebook depends on

def notebooks() -> list[str]:
    """All notebooks of the book, as paths below the root without the ending."""
    found = [*sorted(ROOT.glob("nbs/[0-9]*.ipynb")), *sorted(ROOT.glob("book/*.ipynb"))]
    return [p.relative_to(ROOT).with_suffix("").as_posix() for p in found]


@cache
def code_cells(nb: str) -> list[tuple[str, bool]]:
    """Each code cell: its text without white space at line ends, and whether it holds the parameters."""
    cells = json.loads((ROOT / f"{nb}.ipynb").read_text())["cells"]
    return [("\n".join(line.rstrip() for line in "".join(c["source"]).strip().splitlines()),
             "parameters" in c["metadata"].get("tags", [])) for c in cells if c["cell_type"] == "code"]


@cache
def tree(nb: str) -> ast.Module | None:
    """The syntax tree of a notebook's code, magics left out; None where it cannot be read."""
    code = "\n".join(re.sub(r"(?m)^\s*[%!].*$", "", text) for text, _ in code_cells(nb))
    try:
        return ast.parse(code)
    except SyntaxError:
        return None


@cache
def strings(nb: str, loaded: bool = False) -> set[str]:
    """The texts in a notebook's code; `loaded`: without those that it takes from the package, in calls with source="shipped"."""
    nodes = [*ast.walk(tree(nb) or ast.parse(""))]
    calls = [n for n in nodes if isinstance(n, ast.Call) and any(k.arg == "source" and getattr(k.value, "value", "") == "shipped"
                                                               for k in n.keywords)]
    apart = {n for call in calls if loaded for n in ast.walk(call)}
    return run_names([n for n in nodes if n not in apart])


def run_names(nodes) -> set[str]:
    """The texts among these nodes; task.run("flow") and task.teacher(other or "flow") count as "digits/flow", the name on the digits."""
    nodes = [*nodes]
    pieces = {piece for n in nodes if isinstance(n, ast.JoinedStr) for piece in n.values}
    asked = [n.args[0] for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.args
             and n.func.attr in ("run", "teacher") and getattr(n.func.value, "id", "") == "task"]
    ends = [n for name in asked for n in ast.walk(name) if isinstance(n, ast.Constant) and n not in pieces]
    names = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str) and n not in pieces and n not in ends}
    return names | {f"digits/{n.value}" for n in ends}


@cache
def makes(nb: str) -> set[str]:
    """The runs that a notebook makes: the texts in what is given as `run=` in a call, pieces of f-strings left out."""
    given = [k.value for n in ast.walk(tree(nb) or ast.parse("")) if isinstance(n, ast.Call) for k in n.keywords if k.arg == "run"]
    return run_names((n for value in given for n in ast.walk(value)))


@cache
def makers(nb: str) -> list[str]:
    """The other notebooks that make a run which this one names."""
    return [other for other in notebooks() if other != nb and makes(other) & strings(nb, loaded=True) - makes(nb)]


@cache
def module_files() -> dict[str, Path]:
    return {p.stem: p for p in sorted((ROOT / PACKAGE).glob("*.py")) if p.stem != "_modidx"}


@cache
def public_names() -> dict[str, str]:
    """Which module a name of `import diffcourse` comes from: the table `_names` and the definitions of __init__."""
    names = {}
    for node in ast.parse(module_files()["__init__"].read_text()).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)    # _names = …, _names |= …
        if isinstance(node, (ast.Assign, ast.AugAssign)) and getattr(target, "id", "") == "_names":
            for module, public in ast.literal_eval(node.value).items():
                names.update({n: module for n in (public.split() if isinstance(public, str) else public)})
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = "__init__"
    return names


def imports(code: ast.AST) -> set[str]:
    """The modules of the package that code imports itself; all of them where that cannot be told."""
    found, aliases, used = set(), set(), set()

    def public(name):
        found.update([name] if name in module_files() else [public_names()[name]] if name in public_names() else module_files())

    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            for item in node.names:
                package, _, module = item.name.partition(".")
                if package == PACKAGE and module:
                    public(module)
                if package == PACKAGE and not (module and item.asname):
                    aliases.add(item.asname or PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            package, _, module = (node.module or "").partition(".")
            inside = node.level == 1
            if inside or package == PACKAGE:
                module = node.module if inside else module
                for name in [module] if module else [item.name for item in node.names]:
                    public(name)
    for node in ast.walk(code):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            public(node.attr)
            used.add(node.value)
    loose = {*aliases, "__getattr__"}    # a bare `dc`, or a name looked up while running: anything may be meant
    if any(isinstance(n, ast.Name) and n.id in loose and n not in used for n in ast.walk(code)):
        found.update(module_files())
    return found


@cache
def module_imports(module: str) -> set[str]:
    code = ast.parse(module_files()[module].read_text())
    if module == "__init__":             # its lazy imports load what is asked for, which the caller resolves
        code = ast.Module([n for n in code.body if getattr(n, "name", "") not in ("__getattr__", "__dir__")], [])
    return imports(code)


def modules(nb: str) -> set[str]:
    """The modules that a notebook imports, with those that these import."""
    found, queue = set(), [*(imports(tree(nb)) if tree(nb) else module_files())]
    while queue:
        module = queue.pop()
        if module not in found:
            found.add(module)
            queue += module_imports(module)
    return found


@cache
def module_hash(module: str) -> str:
    """The hash of a module without comments and empty lines (nbdev's comments carry cell numbers)."""
    source = module_files()[module].read_text()
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][:token.start[1]]
    return digest([line.rstrip() for line in lines if line.strip()])


def data_files(nb: str) -> list[Path]:
    """The weights and records in the package that a notebook, or a module that it imports, names."""
    named = strings(nb) - makes(nb)
    for module in modules(nb):
        code = ast.parse(module_files()[module].read_text())
        named |= {n.value for n in ast.walk(code) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    weights, results = ROOT / PACKAGE / "weights", ROOT / PACKAGE / "results"
    index = json.loads((weights / "index.json").read_text()) if (weights / "index.json").exists() else {}
    return [*(weights / index[name]["file"] for name in sorted(index.keys() & named)),
            *(p for p in sorted(results.rglob("*")) if {p.name, p.stem, p.relative_to(results).as_posix()} & named)]


@cache
def parameters(nb: str, scale: str) -> dict:
    path = ROOT / "configs" / scale / f"{Path(nb).name}.yaml"
    if not path.exists():
        return {}
    import yaml

    return yaml.safe_load(path.read_text()) or {}


@cache
def parts(nb: str, scale: str) -> dict[str, str]:
    """All that decides what a run of this notebook shows, each with its hash."""
    return {"its code": digest(code_cells(nb)), "its parameters": digest(parameters(nb, scale)),
            **{f"{PACKAGE}.{m}": module_hash(m) for m in modules(nb)},
            **{p.relative_to(ROOT).as_posix(): digest(p.read_bytes()) for p in data_files(nb)},
            **{other: digest(parts(other, scale)) for other in makers(nb)}}


def newest(nb: str, scale: str) -> dict[str, str]:
    """Which runs stand behind the names that this notebook makes or loads: a run by hand at another size takes a name over."""
    loaded = strings(nb, loaded=True) & set().union(*map(makes, makers(nb)))
    names = sorted(name for name in makes(nb) | loaded if not name.startswith("results/"))  # those of `make results`
    files = {name: ROOT / "build" / scale / "runs" / name / "latest.json" for name in names}
    return {f"run {name}": json.loads(file.read_text())["identity"] for name, file in files.items() if file.exists()}


def executed(nb: str, scale: str) -> Path:
    return ROOT / "build" / scale / f"{nb}.ipynb"


def stale(nb: str, scale: str) -> str:
    """Why a notebook has to run, or nothing."""
    try:
        before = json.loads(executed(nb, scale).read_text())["metadata"][PACKAGE]["parts"]
    except FileNotFoundError:
        return "not run yet"
    except (ValueError, KeyError):
        return "its run cannot be read"
    now = parts(nb, scale) | newest(nb, scale)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    groups = {}
    for key in changed:
        groups.setdefault(key.rpartition("/")[0] or key.partition(".")[0], []).append(key)
    return ", ".join(", ".join(keys) if len(keys) <= 3 else f"{group} ({len(keys)})" for group, keys in groups.items())


# ---------------------------------------------------------------- running

def run_notebook(nb: str, scale: str, bar: bool) -> tuple[float, str]:
    """Execute one notebook and publish it when it is complete. Gives the seconds and, if it failed, why."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    folder = ROOT / "build" / scale
    running, failed = folder / "running" / f"{nb}.ipynb", folder / "failed" / f"{nb}.ipynb"
    for path in (running, failed, executed(nb, scale)):
        path.parent.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    os.environ.update(DIFFCOURSE_HOME=str(folder), PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    os.environ["OMP_NUM_THREADS"] = str((os.cpu_count() or 1) // JOBS)    # more threads than cores collapse
    decided, start = parts(nb, scale), time.perf_counter()
    running.unlink(missing_ok=True)
    try:
        out = papermill.execute_notebook(f"{nb}.ipynb", str(running), parameters(nb, scale), progress_bar=bar, cwd=str(ROOT),
                                         extra_arguments=["--log-level=CRITICAL"],
                                         request_save_on_cell_execute=False)     # but at the end, or when a cell fails
    except KeyboardInterrupt:
        raise
    except Exception as error:
        failed.unlink(missing_ok=True)
        if running.exists():             # not where the kernel died
            os.replace(running, failed)
        where = f"cell {error.cell_index} " if isinstance(error, PapermillExecutionError) else ""
        what = f"{error.ename}: {error.evalue}" if where else f"{type(error).__name__}: {error}"
        ran = f"\n    what ran of it: {failed.relative_to(ROOT)}" if failed.exists() else ""
        return time.perf_counter() - start, f"{where}{what}{ran}"
    seconds = time.perf_counter() - start
    out.metadata[PACKAGE] = {"parts": decided | newest(nb, scale), "seconds": round(seconds, 1)}
    running.write_text(json.dumps(out, indent=1, ensure_ascii=False))
    os.replace(running, executed(nb, scale))
    failed.unlink(missing_ok=True)
    return seconds, ""


def run_all(chosen: list[str], scale: str, force: bool = False) -> None:
    """Run those of the chosen notebooks that are stale, makers first; one failure ends in a non-zero exit."""
    reasons = {nb: "asked for" if force else stale(nb, scale) for nb in chosen}
    awaited = {maker for nb in chosen for maker in makers(nb)}      # first, so that at the end no page waits for one
    todo = sorted((nb for nb in chosen if reasons[nb]), key=lambda nb: nb not in awaited)
    if not todo:
        return print(f"{scale}: all {len(chosen)} runs are up to date")
    total, begin = len(todo), time.perf_counter()
    bar, ended, bad, running = JOBS == 1 and sys.stderr.isatty(), 0, [], {}
    with locked(scale), ProcessPoolExecutor(JOBS, initializer=end_with, initargs=[os.getpid()]) as pool:
        while todo or running:
            blocked = {*todo, *running.values()}
            for nb in [nb for nb in todo if not blocked & {*makers(nb)}][:JOBS - len(running)]:
                todo.remove(nb)
                print(f"[{ended + len(running) + 1}/{total}] {nb} ({reasons[nb]})", flush=True)
                running[pool.submit(run_notebook, nb, scale, bar)] = nb
            if not running:
                stop(f"these notebooks wait for runs of one another: {', '.join(todo)}")
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                nb, ended = running.pop(future), ended + 1
                seconds, fault = future.result()
                print(f"[{ended}/{total}] {nb} {'FAILED after' if fault else 'took'} {seconds:.1f} s", flush=True)
                if fault:
                    print(f"    {fault}", flush=True)
                    bad.append(nb)
                    dropped = [other for other in todo if nb in makers(other)]
                    todo, total = [other for other in todo if other not in dropped], total - len(dropped)
                    print(f"    not run, they load what it makes: {', '.join(dropped)}\n" if dropped else "", end="")
    if bad:
        stop(f"{scale}: {len(bad)} of {total} notebooks failed: {', '.join(bad)}")
    print(f"{scale}: {total} notebooks in {time.perf_counter() - begin:.0f} s")


def end_with(parent: int) -> None:
    """Let a worker end when the runner is killed; its kernel sees that and ends too."""
    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class locked:
    """Only one run of a scale at a time in this checkout."""

    def __init__(self, scale):
        self.path = ROOT / "build" / scale / ".lock"

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "w")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stop(f"another run is at work in {self.path.parent.relative_to(ROOT)}: wait for it or end it")

    def __exit__(self, *_):
        self.file.close()


# ---------------------------------------------------------------- export, sync, site

def sources() -> dict[str, str]:
    """The notebooks and the exported package, each with its hash."""
    files = [*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("book/*.ipynb"), *ROOT.glob(f"{PACKAGE}/*.py"), ROOT / "settings.ini"]
    return {p.relative_to(ROOT).as_posix(): digest(p.read_bytes()) for p in sorted(files)}


def export() -> None:
    """nbdev_export, unless nothing changed since the last one."""
    stamp = ROOT / "build" / "export.json"
    if not stamp.exists() or json.loads(stamp.read_text()) != sources():
        subprocess.run([BIN / "nbdev_export"], cwd=ROOT, check=True)
        module_files.cache_clear()
        write(stamp, json.dumps(sources()))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


def strip(path: Path) -> None:
    """Take outputs, counts and widget states out of a source notebook (nbdev_clean would take the tags with them)."""
    text = path.read_text()
    nb = json.loads(text)
    nb["metadata"].pop("widgets", None)
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    new = json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if new != text:
        write(path, new)


def sync(check: bool) -> None:
    """Export, strip and clean; with `check`, anything that this changes is an error."""
    before = sources()
    for nb in notebooks():
        strip(ROOT / f"{nb}.ipynb")
    for command in (["nbdev_clean"], ["nbdev_clean", "--fname", "book"], ["nbdev_export"]):
        subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, check=True)
    changed = sorted(name for name in {**before, **sources()} if before.get(name) != sources().get(name))
    if check and changed:
        stop("out of sync: " + ", ".join(changed) + "\nnow rewritten as export and clean want it: look at the difference, commit")
    print("sync: " + (", ".join(changed) or "notebooks and modules agree"))


def site(scale: str, target: Path) -> None:
    """Build the pages from the runs of a scale, strictly, beside the old ones; then take their place."""
    late = [f"{nb} ({stale(nb, scale)})" for nb in notebooks() if stale(nb, scale)]
    if late:
        stop(f"no site: these have no fresh run: {', '.join(late)}")
    files = [ROOT / "_toc.yml", *(p for p in ROOT.glob("book/**/*") if p.is_file() and p.suffix != ".pyc"),
             *ROOT.glob("nbs/*.ipynb"), *ROOT.glob(f"{PACKAGE}/*.py"), *(executed(nb, scale) for nb in notebooks())]
    state = digest({p.relative_to(ROOT).as_posix(): digest(p.read_bytes()) for p in sorted(files)})
    stamp = target / ".built-from"
    if not stamp.exists() or stamp.read_text() != state:
        work, start = target.with_name("site-work"), time.perf_counter()
        shutil.rmtree(work, ignore_errors=True)
        command = [BIN / "jupyter-book", "build", ".", "--all", "--quiet", "--toc", "_toc.yml", "--config", "book/_config.yml",
                   "--path-output", work, "--warningiserror", "--nitpick", "--keep-going"]
        env = {**os.environ, "DIFFCOURSE_RUNS": str(ROOT / "build" / scale), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        html = work / "_build" / "html"
        if done.returncode or not (html / "index.html").exists():
            stop(f"{done.stdout}\nno site: jupyter-book failed, what it said stands above")
        (html / ".built-from").write_text(state)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(html, target)
        shutil.rmtree(work)
        print(f"site: built in {time.perf_counter() - start:.0f} s")
    print(f"site: {target / 'index.html'}")


def tensors(safetensors: bytes) -> bytes:
    """What a safetensors file holds after its header, which tells the time of the training too."""
    return safetensors[8 + int.from_bytes(safetensors[:8], "little"):]


def weights(name: str = "") -> None:
    """Publish runs as the weights of the package: the newest of the names in SHIPPED, or the one that a recipe trained."""
    for nb in notebooks():
        if not name and makes(nb) & {*SHIPPED} and (why := stale(nb, "digits")):
            stop(f"weights: {nb} is out of date ({why}): make book")
    for one in [name] if name else SHIPPED:
        publish(one)


def halved(safetensors: bytes) -> bytes:
    """The same tensors and what is said of them, in 16 bits; `load` makes 32 of them again."""
    from safetensors.torch import load, save
    said = json.loads(safetensors[8:8 + int.from_bytes(safetensors[:8], "little")]).get("__metadata__")
    return save({name: tensor.half() for name, tensor in load(safetensors).items()}, said)


def publish(name: str) -> None:
    """Copy the newest run of this name into the package, unless the same weights are there: in 16 bits where no record stands on them."""
    runs, folder = ROOT / "build" / "digits" / "runs" / name, ROOT / PACKAGE / "weights"
    if not (runs / "latest.json").exists():
        stop(f"weights: there is no run {name} in {runs.parent}: make book, or train it by its recipe in configs")
    data = (runs / json.loads((runs / "latest.json").read_text())["identity"] / "model.safetensors").read_bytes()
    data = data if name in SHIPPED else halved(data)
    index = json.loads((folder / "index.json").read_text()) if (folder / "index.json").exists() else {}
    index[name] = {"file": name.replace("/", "-") + ".safetensors", "sha256": digest(data)}
    folder.mkdir(exist_ok=True)
    file = folder / index[name]["file"]
    if file.exists() and tensors(file.read_bytes()) == tensors(data):
        index[name]["sha256"] = digest(file.read_bytes())
        print(f"{name}: the same weights, left as they are")
    else:
        file.write_bytes(data)
        print(f"{name}: {len(data) / 1e6:.2f} MB, sha256 {index[name]['sha256'][:12]}…")
    write(folder / "index.json", json.dumps(index, indent=1) + "\n")


def find(name: str) -> str:
    """The notebook that a name, a path or a number means."""
    short = Path(name).name.removesuffix(".ipynb")
    found = [nb for nb in notebooks() if Path(nb).name == short] or [nb for nb in notebooks() if Path(nb).name.startswith(short)]
    if len(found) != 1 or not short:
        stop(f"no notebook {name!r}: name one of {', '.join(Path(nb).name for nb in notebooks())}")
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["book", "smoke", "nb", "status", "sync", "site", "weights"])
    parser.add_argument("name", nargs="?", default="", help="the notebook of nb, the scale of site and status (digits, smoke), the run of weights")
    parser.add_argument("--check", action="store_true", help="sync: an error if anything had to change")
    parser.add_argument("--force", action="store_true", help="run what is up to date too")
    given = parser.parse_args()
    scale = "smoke" if given.what == "smoke" else "digits"
    if given.what in ("site", "status") and given.name:
        scale = given.name
    if given.what == "sync":
        return sync(given.check)
    if given.what == "weights":
        return weights(given.name)
    if given.what == "status":
        return print("\n".join(f"{nb}: {stale(nb, scale) or 'fresh'}" for nb in notebooks()))
    if given.what != "site":
        export()
        run_all([find(given.name)] if given.what == "nb" else notebooks(), scale, given.force or given.what == "nb")
    if given.what in ("book", "site"):
        site(scale, ROOT / "build" / ("site" if scale == "digits" else f"{scale}/site"))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("\ninterrupted: the next call goes on from here")
