"""A sweep on SLURM: one job for every combination of settings and seeds, by submitit.

    python cluster/submit.py train flow --task digits --seeds 0 1 2
    python cluster/submit.py train flow --task celeba64 --sweep settings.lr=1e-4,2e-4 --sweep settings.batch=64,128 \
        --partition gpu --hours 24 --at-once 8

What this script does not know goes to `diffcourse` as it stands; `--sweep K=A,B` becomes `-p K=A` in one job and `-p K=B` in
another. A job whose time is nearly up saves, is queued again, and goes on. Without SLURM the jobs run here, as processes.
pip install submitit
"""
import argparse
import contextlib
import itertools
import os
import subprocess
import sys

import submitit

AGAIN = 75                                       # exit code of a training that is saved and not done


class Job(submitit.helpers.Checkpointable):
    """One command; submitit calls it in the job, and `checkpoint` when the job must end."""

    def __init__(self, command):
        self.command, self.process = command, None

    def __call__(self):
        code = AGAIN
        while code == AGAIN:                     # `minutes=` is over, the job's time is not
            self.process = subprocess.Popen(self.command, start_new_session=True)   # the job's signals are not for it
            self.end()
            code = self.process.wait()
        if code:
            raise RuntimeError(f"exit code {code}: {' '.join(self.command)}")
        return code

    def end(self):
        """Wait without a lock: `checkpoint` comes in as a signal, and Popen.wait inside Popen.wait waits for ever."""
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)

    def checkpoint(self):
        """Let the training save; submitit queues what comes back."""
        if self.process is not None:
            self.process.terminate()
            self.end()
        return submitit.helpers.DelayedSubmission(Job(self.command))


def commands(base, sweep, seeds):
    """Every combination, as arguments of `diffcourse`."""
    settings = [[f"{key}={value}" for value in values.split(",")] for key, _, values in (s.partition("=") for s in sweep)]
    settings += [[f"seed={seed}" for seed in seeds]] if seeds else []
    return [[*base, *(word for pair in chosen for word in ("-p", pair))] for chosen in itertools.product(*settings)]


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--sweep", action="append", default=[], metavar="K=A,B", help="values of a parameter; again for another")
    parser.add_argument("--seeds", type=int, nargs="+", default=[])
    parser.add_argument("--hours", type=float, default=4, help="of one job, before it is queued again")
    parser.add_argument("--gpus", type=int, default=1, help="of one job, on one node")
    parser.add_argument("--at-once", type=int, default=16, help="jobs that run at the same time")
    parser.add_argument("--partition")
    parser.add_argument("--logs", default="build/jobs")
    parser.add_argument("--cluster", choices=["slurm", "local"], help="default: SLURM where it is")
    options, base = parser.parse_known_args(arguments)
    if not base:
        parser.error("say what to run, such as: train flow --task digits")
    if bad := [s for s in options.sweep if "=" not in s]:
        parser.error(f"--sweep {bad[0]}: K=A,B is needed, such as settings.lr=1e-4,2e-4")
    return options, base


def submit(options, base):
    """The jobs, submitted."""
    launch = [sys.executable]
    if options.gpus > 1:
        launch += ["-m", "diffcourse.processes", "--standalone", "--nproc-per-node", str(options.gpus)]
    jobs = [Job([*launch, "-m", "diffcourse.cli", *words]) for words in commands(base, options.sweep, options.seeds)]
    executor = submitit.AutoExecutor(folder=os.path.join(options.logs, "%j"), cluster=options.cluster, slurm_max_num_timeout=50)
    executor.update_parameters(
        name="diffcourse", timeout_min=round(60 * options.hours), nodes=1, tasks_per_node=1, cpus_per_task=8, mem_gb=32,
        slurm_array_parallelism=options.at_once, slurm_signal_delay_s=120, slurm_gpus_per_node=options.gpus,
        **({"slurm_partition": options.partition} if options.partition else {}))
    with executor.batch():                       # one array
        submitted = [executor.submit(job) for job in jobs]
    return list(zip(jobs, submitted))


if __name__ == "__main__":
    failed = 0
    started = submit(*parse(sys.argv[1:]))
    for job, handle in started:
        print(handle.job_id, " ".join(job.command[1:]), flush=True)
    for job, handle in started if "slurm" not in type(handle).__module__ else []:     # here: wait for them
        try:
            handle.result()
        except submitit.core.utils.UncompletedJobError as error:
            failed += 1
            print(f"{handle.job_id} failed: {error}", file=sys.stderr)
    sys.exit(bool(failed))
