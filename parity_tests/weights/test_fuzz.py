"""A few damaged files of every format; `parity_tests/fuzz.py` is the same with thousands."""

import fuzz
import pytest

pytestmark = [pytest.mark.needs_reference, pytest.mark.usefixtures("quick")]


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_damaged_files_are_refused_or_whole(name):
    ready, *results = fuzz.attempts(name, range(20), seed=0)
    assert ready == {} and len(results) == 20
    assert fuzz.faults(results) == []
    assert sum(result["outcome"] == "refused" for result in results) >= 5


def test_faults_would_be_seen(tmp_path):
    """Of every kind that one process can see."""

    def unclear(path):
        raise TypeError("what?")

    def nameless(path):
        raise ValueError("a bad file")

    def greedy(path):
        return bytearray(b"x") * (fuzz.MEMORY + 2**20) and b"weights"

    def seen(load):
        form = fuzz.Format(write=lambda folder: folder, load=load, checksum=lambda path: True)
        result = {"number": 0, "size": 0} | fuzz.attempt(form, tmp_path, b"weights")
        return result["outcome"], bool(fuzz.faults([result]))

    assert seen(lambda path: b"weights") == ("same", False)
    assert seen(lambda path: b"other") == ("changed in spite of a checksum", True)
    assert seen(unclear) == seen(nameless) == ("unclear", True)
    assert seen(greedy) == ("same", True)
