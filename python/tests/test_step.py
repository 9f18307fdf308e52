"""A step on the Host device, through the eager prologue: adopt, seal, begin, refill, arm, run."""

import numpy as np
import pytest
from conftest import Rig, ints

import pristine
from pristine import Axis


def test_values_are_placed_and_tails_padded(rig):
    rig.arm(5, 6)
    assert rig.run() == [5, 6, 0, 0]
    rig.arm(1, 2, 3, 4)
    assert rig.run() == [1, 2, 3, 4]
    assert rig.manager.poll() == [] and rig.manager.verify() == []
    assert rig.manager.stats().replays == 2


def test_every_kind_pads_by_its_own_rule():
    rig = Rig()
    m = rig.manager
    indptr, pages, slots = (np.zeros(n, np.int32) for n in (5, 8, 4))
    mask, hidden = np.ones(4, np.bool_), np.ones((4, 3), np.float16)
    refilled = {
        m.adopt("ptr", indptr, role="refilled", kind="indptr", axis=Axis.requests_plus_one(), limit=8): ints(0, 2, 3),
        m.adopt("pages", pages, role="refilled", kind="page_table", axis=Axis.pages(), limit=9, dummy=7): ints(4, 5, 6),
        m.adopt("slots", slots, role="refilled", kind="slot", axis=Axis.tokens(), limit=9): ints(8, 0),
        m.adopt("mask", mask, role="refilled", kind="mask", axis=Axis.requests()): np.array([False, True]),
        m.adopt("hidden", hidden, role="refilled", axis=Axis.rows(3)): np.full((2, 3), 2, np.float16),
    }
    m.seal()
    m.begin_step(4, 2)
    m.refill(rig.lengths, ints(2, 1))
    for buffer, values in refilled.items():
        m.refill(buffer, values)
    m.before_replay(4, 2)
    assert rig.run() == [2, 1, 0, 0]
    assert indptr.tolist() == [0, 2, 3, 3, 3]
    assert pages.tolist() == [4, 5, 6, 7, 7, 7, 7, 7]
    assert slots.tolist() == [8, 0, -1, -1]
    assert mask.tolist() == [False, True, False, False]
    assert hidden.tolist() == [[2] * 3] * 2 + [[0] * 3] * 2
    assert m.verify() == []


def test_restored_buffers_come_back_and_constants_are_healed():
    rig = Rig(check="always")
    scale, work = np.full(3, 16, np.float32), ints(1, 2, 3)
    rig.manager.adopt("scale", scale)
    rig.manager.adopt("work", work, role="restored")
    rig.manager.seal()
    scale[1], work[2] = 7, 99
    rig.arm(5)
    rig.run()
    assert scale.tolist() == [16] * 3 and work.tolist() == [1, 2, 3]
    (report,) = rig.manager.poll()
    assert (report.kind, report.buffer, report.index, report.bucket) == ("polluted", "scale", 1, (4, 4))
    assert "scale[1]" in str(report)
    assert rig.manager.stats().healed == 1


def test_the_original_may_be_given_and_restore_all_shows_it():
    rig = Rig()
    memory = ints(0, 0, 0)
    rig.manager.adopt("indptr", memory, kind="indptr", role="restored", original=ints(0, 50, 100), limit=100)
    rig.manager.seal()
    rig.manager.restore_all(4)
    rig.device.synchronize()
    assert memory.tolist() == [0, 50, 100]


def test_restore_by_the_caller():
    rig = Rig(restore="stream")
    work = ints(1, 2, 3)
    rig.manager.adopt("work", work, role="restored")
    rig.manager.seal()
    work[:] = 9
    rig.arm(5)
    rig.run()
    assert work.tolist() == [9, 9, 9]
    rig.manager.restore()
    rig.device.synchronize()
    assert work.tolist() == [1, 2, 3]


def test_a_value_that_breaks_its_rule_makes_the_replay_harmless(rig):
    rig.arm(5, 101)
    assert rig.run() == [0, 0, 0, 0]
    (report,) = rig.manager.poll()
    assert (report.kind, report.index, report.actual, report.expected) == ("invalid value", 1, 101, 100)
    assert rig.manager.stats().neutralised == 1
    rig.arm(7)
    assert rig.run() == [7, 0, 0, 0]


def test_a_prologue_that_nobody_armed_is_reported_and_harmless(rig):
    assert rig.run() == [0, 0, 0, 0]
    (report,) = rig.manager.poll()
    assert report.kind == "launched without BeforeReplay"


def test_keep_takes_the_last_values_again(rig):
    rig.arm(5, 6)
    rig.run()
    rig.manager.begin_step(4, 2)
    rig.manager.keep(rig.lengths)
    rig.manager.before_replay(4, 2)
    assert rig.run() == [5, 6, 0, 0]
    assert rig.manager.generation(rig.lengths) == 2


def test_only_graphs_of_its_bucket_ask_for_a_buffer():
    rig = Rig()
    plan = rig.manager.adopt("plan", np.zeros(2, np.int32), role="refilled", only_bucket=(2, 2))
    rig.manager.seal()
    rig.arm(1)
    rig.run()
    rig.manager.begin_step(2, 1)
    rig.manager.refill(rig.lengths, ints(3))
    rig.manager.refill(plan, ints(8, 9))
    rig.manager.before_replay(2, 1)
    assert rig.run(bucket=2)[:2] == [3, 0]


def test_extents_are_requests_or_requests_and_tokens(rig):
    verify = pristine.Extent(requests=2, tokens=6)
    rig.manager.begin_step((4, 16), verify)
    rig.manager.refill(rig.lengths, ints(1, 2))
    rig.manager.before_replay((4, 16), (2, 6))
    assert rig.run(bucket=(4, 16)) == [1, 2, 0, 0]


def test_ranks_can_compare_what_their_prologues_cover():
    def hash_of(*extra: str, **options: object) -> int:
        rig = Rig(**options)
        for name in extra:
            rig.adopt(name, np.zeros(4, np.int32))
        rig.manager.seal()
        with pytest.raises(pristine.NotFoundError):
            rig.manager.signature_hash(4)
        rig.manager.record_prologue(4)
        rig.device.synchronize()
        return rig.manager.signature_hash(4)

    assert 0 <= hash_of() < 2**64
    assert hash_of() == hash_of()
    assert len({hash_of(), hash_of("more"), hash_of("other"), hash_of(check="always")}) == 4


def test_every_slot_in_flight_is_resource_exhausted_and_waiting_helps():
    rig = Rig(staging_slots=2)
    rig.manager.seal()
    for value in range(50):
        rig.manager.wait_for_slot()
        rig.arm(value)
        rig.manager.record_prologue(4)
    rig.device.synchronize()
    assert rig.memory.tolist() == [49, 0, 0, 0] and rig.manager.poll() == []


def test_random_steps_match_numpy():
    seed = np.random.SeedSequence().entropy % 2**32
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    rig = Rig()
    indptr = np.zeros(5, np.int32)
    ptr = rig.manager.adopt("indptr", indptr, role="refilled", kind="indptr", axis=Axis.requests_plus_one())
    rig.manager.seal()
    for _ in range(200):
        bucket = int(random.integers(1, 5))
        lengths = random.integers(0, 100, int(random.integers(0, bucket + 1))).astype(np.int32)
        sums = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        rig.manager.begin_step(bucket, len(lengths))
        rig.manager.refill(rig.lengths, lengths)
        rig.manager.refill(ptr, sums)
        rig.manager.before_replay(bucket, len(lengths))
        rig.run(bucket)
        tail = bucket - len(lengths)
        np.testing.assert_array_equal(rig.memory[:bucket], np.pad(lengths, (0, tail)))
        np.testing.assert_array_equal(indptr[: bucket + 1], np.pad(sums, (0, tail), mode="edge"))
    assert rig.manager.verify() == []
