"""Make .venv: pip install the project and its development tools, once.

Runs under any Python 3 (so that a Python that is too old is told so) and uses the standard library alone. The stamp in .venv is
a fingerprint of what decides the packages; it is written last, so an interrupted run is repaired by the next one.
"""
import hashlib
import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, "diffcourse.stamp")
LOG = os.path.join(ROOT, "build", "env.log")
NEEDS = (3, 11)
REPORT = """
import torch, torchvision
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "CPU"
print("torch %s, torchvision %s on %s" % (torch.__version__, torchvision.__version__, device))
"""
FAULTS = [                                # what pip or venv says -> what to do about it
    ("No space left on device|Errno 28", "no disk space left: the packages need about 9 GB while they install, 6.4 GB of it in "
     ".venv and 2.6 GB in TMPDIR (about 2 GB in all with TORCH_INDEX= torch's own CPU index); free some in %s and in TMPDIR" % ROOT),
    ("ensurepip|No module named '?venv", "this Python has no venv module: install it (Debian: apt-get install python3-venv) "
     "or name another Python: make env PYTHON=python3.12"),
    ("NewConnectionError|Connection refused|Connection broken|Name or service not known|Max retries|Temporary failure in name|"
     "ProxyError|ReadTimeout|Could not find a version|No matching distribution",
     "no package index answers with what is needed: check the network, pip's settings (pip config list) and TORCH_INDEX"),
    ("Permission denied|Read-only file system", "cannot write below %s: make it writable" % ROOT),
]


def stop(message):
    sys.exit("make env: " + message)


def fingerprint():
    digest = hashlib.sha256(ROOT.encode())                        # the editable install points at this folder
    for name in ("settings.ini", "setup.py", "pyproject.toml"):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def call(*command):
    """Run a command, its output to LOG and its stage to the terminal; stop with one line that says what to do."""
    with open(LOG, "a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        said = []
        for line in process.stdout:
            log.write(line)
            said.append(line)
            if sys.stdout.isatty() and re.match("Collecting|  Downloading|Installing", line):
                print("\r\033[Kenv: " + line.strip()[:70], end="", flush=True)
    if sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)
    if process.wait() == 0:
        return "".join(said).strip()
    text = "".join(said)
    reason = [advice for pattern, advice in FAULTS if re.search(pattern, text)]
    errors = [line.strip() for line in text.splitlines() if "error" in line.lower()] or ["exit status %d" % process.returncode]
    stop((reason or errors[-1:])[0] + " (all of it: build/env.log)")


def works():
    """Is there a .venv whose Python is new enough and has pip?"""
    test = "import sys, pip; sys.exit(sys.version_info < %r)" % (NEEDS,)
    try:
        return subprocess.call([PYTHON, "-c", test], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def drop_halves():
    """Forget packages whose install was cut off: pip writes RECORD last, and takes a package without one for whole."""
    for folder, names, files in os.walk(os.path.join(VENV, "lib")):
        if folder.endswith(".dist-info"):
            names[:] = []
            if "RECORD" not in files:
                shutil.rmtree(folder)


def main():
    if sys.version_info < NEEDS:
        stop("Python %d.%d or newer is needed and this is %d.%d: install one and name it, as in: make env PYTHON=python3.12"
             % (NEEDS + sys.version_info[:2]))
    wanted = fingerprint()
    if os.path.exists(STAMP) and os.path.exists(PYTHON):
        with open(STAMP) as file:
            if file.readline().strip() == wanted:
                return print("env: .venv is ready: " + file.readline().strip())
    try:
        os.makedirs(os.path.dirname(LOG), exist_ok=True)
        open(LOG, "w").close()
    except OSError as error:
        stop("cannot write %s: %s" % (LOG, error.strerror))
    print("env: installing into .venv, the first time takes minutes (progress in build/env.log)", flush=True)
    if not works():
        call(sys.executable, "-m", "venv", "--clear", VENV)
    drop_halves()
    pip = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check"]
    if os.environ.get("TORCH_INDEX"):
        call(*pip + ["--index-url", os.environ["TORCH_INDEX"], "torch", "torchvision"])
    call(*pip + ["setuptools>=77"])                               # the builder, so that the next line needs no isolation
    call(*pip + ["--no-build-isolation", "-e", ".[dev]"])
    report = call(PYTHON, "-W", "ignore", "-c", REPORT).splitlines()[-1]
    with open(STAMP + ".new", "w") as file:
        file.write("%s\n%s\n" % (wanted, report))
    os.replace(STAMP + ".new", STAMP)
    print("env: .venv is ready: " + report)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted; the next make env goes on")
