from worker.distill.phase_times import PhaseTimes, process_seconds


def test_a_phase_inside_another_pauses_it() -> None:
    now = [0.0]
    times = PhaseTimes(before_seconds=2.0, clock=lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    spend(1.0)
    with times.phase("training"):
        spend(10.0)
        with times.phase("teacher"):
            spend(5.0)
        spend(1.0)
    spend(0.5)
    assert times.seconds == {"start": 3.5, "training": 11.0, "teacher": 5.0}


def test_a_process_has_an_age() -> None:
    assert process_seconds() > 0
