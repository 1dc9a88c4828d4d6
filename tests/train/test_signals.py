"""The first signal asks, the second one stops; handlers come back; children and ignored signals are left alone."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tunesmith.train import signals
from tunesmith.train.signals import graceful

ALL = [n for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


def handlers():
    return {name: signal.getsignal(getattr(signal, name)) for name in ALL}


@pytest.mark.parametrize("name", ALL)
def test_the_first_signal_sets_the_flag_and_the_second_interrupts(name):
    before = handlers()
    with pytest.raises(KeyboardInterrupt), graceful() as stop:
        assert stop.requested is None
        signal.raise_signal(getattr(signal, name))
        assert stop.requested == name
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the second signal did not interrupt")
    assert handlers() == before and stop.requested == name


def test_handlers_come_back_after_an_error_and_nest():
    before = handlers()
    with pytest.raises(ZeroDivisionError), graceful():
        raise ZeroDivisionError
    assert handlers() == before
    with graceful() as outer, graceful() as inner:
        signal.raise_signal(signal.SIGTERM)
    assert handlers() == before and inner.requested == "SIGTERM" and outer.requested is None


def test_a_sleep_is_not_cut_short_and_the_loop_sees_the_flag():
    steps = 0
    with graceful() as stop:
        timer = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        while not stop.requested:
            time.sleep(0.002)  # PEP 475: goes on after the handler ran
            steps += 1
        timer.join()
    assert stop.requested == "SIGINT" and steps


def test_another_thread_gets_a_flag_that_stays_none():
    seen = []

    def work():
        with graceful() as stop:
            seen.append(stop.requested)

    before = handlers()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None] and handlers() == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with graceful() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.requested is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_system_without_sighup(monkeypatch):
    monkeypatch.setattr(signals, "NAMES", ("SIGINT", "SIGNOSUCH"))
    with graceful() as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.requested == "SIGINT"


def test_a_forked_child_dies_of_its_first_signal():
    with graceful() as stop:
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        assert stop.requested is None


def test_a_real_process_saves_and_ends_and_a_second_signal_ends_it_at_once():
    script = """
import sys, time
from tunesmith.train.signals import graceful
with graceful() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("saving", flush=True)
    if sys.argv[1] == "slow":
        time.sleep(600)
    print("saved", flush=True)
"""
    for speed, end, code in (("fast", "saved", 0), ("slow", "", 130)):
        child = subprocess.Popen(
            [sys.executable, "-c", script, speed], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == "saving\n"
        if speed == "slow":
            child.send_signal(signal.SIGINT)
        assert child.stdout.read().strip() == end
        assert child.wait() in (code, -signal.SIGINT if speed == "slow" else code)
