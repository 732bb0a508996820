"""What is said while one waits."""

from qmx import progress


def test_counted(monkeypatch, capsys):
    """How many there are and how long the rest takes, once something was made; what is found done
    takes no time; at most a line in ten seconds."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    count = progress.counted("student", 12)
    for seconds, made in ((9, False), (3, False), (20, True), (4, True), (36, True)):
        clock[0] += seconds
        count(made)
    assert capsys.readouterr().err.splitlines() == [
        "student 3 of 12, about 3 min left",
        "student 5 of 12, about 2 min left",
    ]


def test_about():
    assert [progress.about(seconds) for seconds in (7, 95, 3600, 9000)] == [
        "about 7 s",
        "about 2 min",
        "about 60 min",
        "about 2.5 h",
    ]
