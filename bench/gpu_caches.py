"""Cache sizes of this CPU four ways in one run: `python bench/gpu_caches.py [DEVICE] [RUNS] [--full]`.

What the system states; what a pointer chase in plain C sees (compiled now, pages of 2 MiB where the system gives them,
one thread, no OpenCL and nothing of npulab's analysis); what is left of memory that all cores have read at once, in C,
too, load by load; what RUNS probes (1 unless told otherwise, quick ones unless --full) of the hierarchy find on OpenCL
device DEVICE. Every run is printed, a step is half an octave. A chase finds less of a cache that neighbours use, the
slower it is the less; what is read at once is quick. Skips, with the reason, what needs a C compiler, Linux or
pyopencl. About two minutes on two cores for each probe and one for the C programs.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from npulab.errors import NpulabError
from npulab.gpu.analysis import caches
from npulab.gpu.analysis.meter import Meter, Refused, reason
from npulab.gpu.opencl import open_device

SYSTEM = Path("/sys/devices/system/cpu/cpu0/cache")
"""Linux copies what the processor says of itself (CPUID leaf 4 of Intel's), in a guest what the host lets it say."""
PASSES = 8
PATIENCE = 170  # seconds for the C program
UP = 1.04  # a step of the curve that is part of a rise
LEAVES = 1.4  # a rise, in all
WORTH = 0.3  # of a footprint that is still there: less is within what a sample of 400 errs by
COMMON = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static uint64_t state = 88172645463325252u;

static uint64_t below(uint64_t n) {  /* xorshift: Marsaglia, 2003 */
    state ^= state << 13; state ^= state >> 7; state ^= state << 17;
    return state % n;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}
"""
CHASE = COMMON + r"""
enum { LINE = 64, SMALLEST = 8 << 10, LARGEST = 64 << 20, COARSE = 8 << 20, POINTS = 64, REPEATS = 5, LOADS = 200000 };
static const size_t HUGE_PAGE = 2 << 20;

static void shuffle(uint32_t *x, size_t n) {
    for (size_t i = n; i > 1; i--) { size_t j = below(i); uint32_t t = x[i - 1]; x[i - 1] = x[j]; x[j] = t; }
}

static long huge(void) {  /* KiB of this process in huge pages */
    char line[256]; long all = 0, one;
    FILE *f = fopen("/proc/self/smaps", "r");
    while (f && fgets(line, sizeof line, f)) if (sscanf(line, "AnonHugePages: %ld", &one) == 1) all += one;
    if (f) fclose(f);
    return all;
}

/* ns of a load of a chase through `bytes`, in a random order of pieces and within each */
static double chase(size_t bytes, size_t piece, long *in_huge) {
    size_t places = bytes / LINE, size = (bytes + 2 * HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE, at = 0;
    size_t each = piece < bytes ? piece / LINE : places, pieces = (places + each - 1) / each;
    char *map = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) exit(1);
    char *data = (char *)(((uintptr_t)map + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    madvise(map, size, MADV_HUGEPAGE);
    memset(data, 0, bytes);
    *in_huge = huge();
    uint32_t *order = malloc(4 * places), *of = malloc(4 * pieces);
    for (size_t i = 0; i < pieces; i++) of[i] = i;
    shuffle(of, pieces);
    for (size_t i = 0; i < pieces; i++) {
        size_t first = at;
        for (size_t x = of[i] * each; x < places && x < (of[i] + 1) * each; x++) order[at++] = x;
        shuffle(order + first, at - first);
    }
    for (size_t i = 0; i < places; i++)
        *(void **)(data + (size_t)order[i] * LINE) = data + (size_t)order[(i + 1) % places] * LINE;
    void **p = (void **)data;
    size_t turns = LOADS / places + 1;
    double best = 1e30;
    for (size_t i = 0; i < places; i++) p = *p;
    for (int r = 0; r < REPEATS; r++) {
        double begun = now();
        for (size_t i = 0; i < turns * places; i++) p = *p;
        double took = (now() - begun) / (turns * places);
        if (took < best) best = took;
    }
    if (!p) exit(1);
    munmap(map, size); free(order); free(of);
    return best;
}

int main(int count, char **args) {
    static size_t bytes[POINTS]; static double least[POINTS];
    int points = 0, passes = atoi(args[1]); size_t piece = count > 2 ? atol(args[2]) : (size_t)-1;
    long in_huge = 0;
    for (double f = SMALLEST; f <= LARGEST; f *= f < COARSE ? 1.189207115 : 1.414213562) {
        bytes[points] = (size_t)(f + 0.5) / LINE * LINE; least[points++] = 1e30;
    }
    for (int pass = 0; pass < passes; pass++)  /* the tries of a footprint far apart in time */
        for (int i = 0; i < points; i++) {
            double took = chase(bytes[i], piece, &in_huge);
            if (took < least[i]) least[i] = took;
        }
    printf("%ld\n", in_huge);
    for (int i = 0; i < points; i++) printf("%zu %.3f\n", bytes[i], least[i]);
    return 0;
}
"""

HELD = COMMON + r"""
enum { LINE = 64, PAGE = 4096, SAMPLE = 400, TRIES = 24, FOOTPRINTS = 18, MOST = 64 };
static char *data;
static size_t bytes;
static long cores;
static volatile long turn, finished;
static volatile uint64_t sink;

static void read_share(long core) {
    size_t first = bytes / cores * core, last = first + bytes / cores;
    uint64_t sum = 0;
    for (size_t i = first; i + LINE <= last; i += LINE) sum += *(volatile uint64_t *)(data + i);
    sink = sum;
}

static void *helper(void *core) {
    for (long seen = 0;; seen++) {
        while (turn == seen) {}
        read_share((long)core);
        __sync_fetch_and_add(&finished, 1);
    }
    return 0;
}

static void read_all(size_t size) {
    bytes = size / LINE / cores * LINE * cores; finished = 0;
    __sync_synchronize();
    turn++;
    read_share(0);
    while (finished < cores - 1) {}
}

static double one(size_t size) {  /* ns of a load and of the clock; a neighbour's load has translated the page before */
    size_t line = below(size / LINE), beside = line / (PAGE / LINE) * (PAGE / LINE) + below(PAGE / LINE);
    *(volatile char *)(data + beside * LINE);
    if (beside == line) return -1;
    __sync_synchronize();
    double begun = now();
    *(volatile char *)(data + line * LINE);
    __sync_synchronize();  /* the load is done before the clock is read again */
    return now() - begun;
}

static int order(const void *a, const void *b) { double x = *(double *)a, y = *(double *)b; return (x > y) - (x < y); }

static double middle(size_t size) {  /* of the loads after all have read `size` bytes twice */
    static double took[SAMPLE];
    read_all(size); read_all(size);
    for (int i = 0; i < SAMPLE; i++) while ((took[i] = one(size)) < 0) {}
    qsort(took, SAMPLE, sizeof *took, order);
    return took[SAMPLE / 2];
}

int main(int count, char **args) {
    size_t largest = (size_t)512 << 20;
    long have = sysconf(_SC_NPROCESSORS_ONLN), most = count > 1 ? atol(args[1]) : MOST;
    cores = have < most ? have : most;
    data = mmap(0, largest, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return 1;
    madvise(data, largest, MADV_HUGEPAGE);
    for (size_t i = 0; i < largest; i += LINE) data[i] = 1;
    for (long core = 1; core < cores; core++) {
        pthread_t thread;
        if (pthread_create(&thread, 0, helper, (void *)core)) return 1;
    }
    double hit = 1e30, miss = middle(largest);
    for (int i = 0; i < TRIES; i++) { double t = middle((size_t)2 << 20); if (t < hit) hit = t; }
    printf("%.1f %.1f\n", hit, miss);
    double footprint = 4 << 20;
    for (int f = 0; f < FOOTPRINTS; f++, footprint *= 1.296839555) {  /* 3/8 of an octave; to 332 MiB */
        size_t size = (size_t)footprint;
        double share[TRIES];
        for (int i = 0; i < TRIES; i++) {
            int hits = 0;
            read_all(size); read_all(size);
            for (int k = 0; k < SAMPLE; k++) {
                double t;
                while ((t = one(size)) < 0) {}
                hits += t < (hit + miss) / 2;
            }
            share[i] = (double)hits / SAMPLE;
        }
        qsort(share, TRIES, sizeof *share, order);
        printf("%zu %.4f %.4f\n", size, share[TRIES / 2], share[TRIES - 1]);
    }
    return 0;
}
"""


def held(cores: int) -> tuple[float, float, list[tuple[int, float, float]]]:
    """(ns of a load that the last cache answers, of one that memory does, [(bytes, the share that is still there after
    so many cores have read them twice at once: median of tries, most)]). Loads are timed one by one, which shows hits
    and misses as they are, with the clock's own time. Raises: OSError, subprocess.SubprocessError, ValueError."""
    out = _ran(HELD, "-pthread", arguments=[str(cores)])
    rows = zip(out[2::3], out[3::3], out[4::3], strict=True)
    return float(out[0]), float(out[1]), [(int(b), float(m), float(most)) for b, m, most in rows]


def _ran(source: str, *options: str, arguments: Sequence[str] = ()) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        code, program = Path(folder) / "witness.c", Path(folder) / "witness"
        code.write_text(source)
        subprocess.run(["cc", "-O1", *options, "-o", program, code], check=True, capture_output=True, timeout=60)
        return subprocess.run([program, *arguments], check=True, capture_output=True, timeout=PATIENCE,
                              text=True).stdout.split()


def chased(passes: int, piece: int = 0) -> tuple[int, list[tuple[int, float]]]:
    """(bytes of the largest footprint in pages of 2 MiB, [(bytes, ns of a load, the least of `passes`)]), at random
    through all, or in pieces of so many bytes. Raises: OSError, subprocess.SubprocessError, ValueError."""
    out = _ran(CHASE, arguments=[str(passes), *([str(piece)] if piece else [])])
    return int(out[0]) << 10, [(int(b), float(t)) for b, t in zip(out[1::2], out[2::2], strict=True)]


def leavings(curve: Sequence[tuple[int, float]]) -> list[tuple[float, float, float]]:
    """[(bytes where loads leave a level, ns before, ns after)]: neighbours that rise by UP or more each are one rise;
    it counts if it is of LEAVES or more in all, and lies where half of it is done."""
    times = [t for _, t in curve]
    for i in range(len(times) - 2, -1, -1):  # what holds more cannot be quicker: its neighbour was disturbed
        times[i] = min(times[i], times[i + 1])
    found, i = [], 0
    while i + 1 < len(times):
        last = i
        while last + 1 < len(times) and times[last + 1] > UP * times[last]:
            last += 1
        low, high = times[i], times[last]
        if high > LEAVES * low:
            k = next(k for k in range(i + 1, last + 1) if times[k] >= (low + high) / 2)
            part = ((low + high) / 2 - times[k - 1]) / (times[k] - times[k - 1])
            found.append((curve[k - 1][0] * (curve[k][0] / curve[k - 1][0]) ** part, low, high))
        i = max(last, i + 1)
    return found


def stated(system: Path = SYSTEM) -> list[tuple[str, int, str]]:
    """[(name, bytes, the cores that share it)] of the first CPU's caches of data, as the system says."""
    found = []
    for index in sorted(system.glob("index*")):
        def said(what: str, index: Path = index) -> str:
            return (index / what).read_text().strip()

        if said("type") != "Instruction":
            size = said("size")
            found.append((f"L{said('level')}", int(size[:-1]) << {"K": 10, "M": 20}[size[-1]], said("shared_cpu_list")))
    return found


def steps(found: float, other: float) -> str:
    """Half octaves from the one to the other."""
    return f"{2 * math.log2(found / other):+.1f}"


def compared(sizes: Sequence[float], known: Sequence[tuple[str, int, str]], witness: Sequence[float]) -> str:
    parts = []
    for i, size in enumerate(sizes):
        said = [f"{steps(size, o)} of {what}" for what, of in (
            ("stated", [b for _, b, _ in known]), ("the chase in C", witness)) for o in of[i:i + 1]]
        parts.append(f"L{i + 1} {size / 1024:.0f} KiB" + (f" ({', '.join(said)})" if said else ""))
    return "; ".join(parts) or "nothing"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("device", nargs="?", type=int, default=0)
    parser.add_argument("runs", nargs="?", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="probes that are not quick")
    args = parser.parse_args()
    known = stated()
    print("stated by " + (f"{SYSTEM}: " + ", ".join(f"{n} {b >> 10} KiB (cores {c})" for n, b, c in known)
                          if known else "the system: nothing"))
    witness: list[float] = []
    for how, piece in (("at random", 0), ("in pieces of 64 KiB", 1 << 16)):
        if not shutil.which("cc") or sys.platform != "linux":
            print("chase in C: skipped: it needs a C compiler (cc) and Linux")
            break
        try:
            pages, curve = chased(PASSES, piece)
        except (OSError, subprocess.SubprocessError, ValueError) as e:
            print(f"chase in C: skipped: {e}")
            break
        left = leavings(curve)
        witness = witness or [x for x, _, _ in left]
        print(f"chase in C, {how}, least of {PASSES}, {pages >> 20} of {curve[-1][0] >> 20} MiB in pages of 2 MiB, "
              "KiB: ns")
        print(textwrap.fill("  ".join(f"{b / 1024:.0f}:\xa0{t:.3g}" for b, t in curve), 100, initial_indent="  ",
                            subsequent_indent="  ").replace("\xa0", " "))
        print("  leaves " + ("; ".join(f"{x / 1024:.0f} KiB, from {a:.3g} to {b:.3g} ns" for x, a, b in left)
                             or "no level"))
        print("  " + compared([x for x, _, _ in left], known, []))
    for cores in (1, os.cpu_count() or 1) if witness else ():
        try:
            hit, miss, shares = held(cores)
        except (OSError, subprocess.SubprocessError, ValueError) as e:
            print(f"what is read at once, in C: skipped: {e}")
            break
        middle, most = (max(b * found[i] for b, *found in shares if found[i] >= WORTH) for i in (0, 1))
        print(f"read twice by {cores} of the cores and still there, in C, MiB: median of 24 tries, most ({hit:.0f} and "
              f"{miss:.0f} ns a load with the clock's own)")
        print(textwrap.fill("  ".join(f"{b / 2**20:.0f}:\xa0{b * m / 2**20:.1f},\xa0{b * best / 2**20:.1f}"
                                      for b, m, best in shares), 100, initial_indent="  ",
                            subsequent_indent="  ").replace("\xa0", " "))
        print(f"  {middle / 2**20:.1f} and {most / 2**20:.1f} MiB" + (
            f" ({steps(middle, known[-1][1])} and {steps(most, known[-1][1])} of stated)" if known else ""))
        witness = [*witness[:len(known) - 1], most] if known else witness
    try:
        bench = open_device(args.device)
    except NpulabError as e:
        print(f"probe: skipped: {e.message}")
        return 0
    print(f"probe of {bench.identity.name}, {bench.identity.platform}" + ("" if args.full else ", quick"))
    for _ in range(args.runs):
        begun = time.monotonic()
        meter = Meter(bench, quick=not args.full)
        try:
            found = caches.hierarchy(meter)
        except (Refused, NpulabError) as e:
            print(f"  refused: {reason(e)}")
            continue
        print(f"  {compared([x.size for x in found.levels], known, witness)}; "
              + ", ".join(x.cliff.shape for x in found.levels)
              + f"; {meter.experiments} experiments, {time.monotonic() - begun:.0f} s"
              + (f"; {found.fault}" if found.fault else ""), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
