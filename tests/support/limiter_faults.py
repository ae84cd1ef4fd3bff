"""The limiter's rules left out, one at a time: what the search must find.

Each is the smallest change that leaves a rule out, with a small world in which that shows. These are not in the
list. Of the first a search of such a world to its end found nothing; of the others that is argued, not searched:

- *A worker is not told that its tokens were dropped* (5): its own deadline, counted from the sending, has come before
  the store's conversion (7).
- *The clock stepping back is taken* (13): what was charged or leased then lasts that much longer. It takes a later
  step forward to do harm, which no rule bears.
- *A record below the oldest tag is not charged in full* (4): where the run or the marker tells of the loss, nothing
  is granted until all that was forgotten has left the window. This is the guard behind that one.
- *A spend is charged later than its use, a report twice, a spend in a slot to come* (2, 4): the caller's loss only.
- *The slack of the deadline* (7): no clock drifts here.
- *One token of each limit or none* (11): there is one limit here; `test_leases` has several.

The rules for an absence of the store are left out too (`ABSENT_FAULTS`). What they are for comes too late on a path
for a search from its beginning: these are found by walks. Not in that list: *a worker is here before it told all* (R2),
as with one key its first message tells all; `test_leases` has several.
"""

from dataclasses import dataclass

from msgspec.structs import replace

from lucid.core.rules.bucket import Bucket, Call, KeyAnswer, Message, Status, Store
from lucid.core.rules.leases import Flight
from tests.support.limiter_world import EagerLease, EagerLeases, Rules, Size


class CountsKSlots(Bucket):
    def advance(self, now_ms: int, slot_ms: int) -> None:
        super().advance(now_ms, slot_ms)
        for slot in [slot for slot in self.ring if slot <= self.slot - self.slots]:
            self.spent -= self.ring.pop(slot)


class ConvertsIntoTheGrantsSlot(Bucket):
    def advance(self, now_ms: int, slot_ms: int) -> None:
        self.now_ms, self.slot_ms = max(self.now_ms, now_ms), slot_ms
        for record in self.holders.values():
            if record.live and self.now_ms >= record.expires_ms:
                record.live = False
                self.charge((record.expires_ms - 3 * slot_ms // 2) // slot_ms, record.size)
        super().advance(now_ms, slot_ms)


class ForgetsWhatExpired(Bucket):
    def advance(self, now_ms: int, slot_ms: int) -> None:
        for holder, record in list(self.holders.items()):
            if record.live and now_ms >= record.expires_ms:
                del self.holders[holder]
        super().advance(now_ms, slot_ms)


class DebitsAtTheGrant(Bucket):
    def lease(self, message: Message, holder: str, kept: int, free: int) -> tuple[int, int]:
        granted, life_ms = super().lease(message, holder, kept, free)
        self.charge(self.slot, granted)
        if granted:
            self.holders[holder].size = 0
        return granted, life_ms

    def settle(self, message: Message, holder: str) -> tuple[Status, int]:
        return super().settle(replace(message, journal=[], keep=0), holder)


class GrantsWhatOthersHold(Bucket):
    def reserved(self) -> int:
        return 0


class GrantsBeyondWhatIsFree(Bucket):
    """What the caller keeps is not counted."""

    def lease(self, message: Message, holder: str, kept: int, free: int) -> tuple[int, int]:
        return super().lease(message, holder, 0, free + kept)


class ChargesEarly(Bucket):
    def charge(self, slot: int, count: int) -> None:
        super().charge(slot - 1 if slot < self.slot else slot, count)


class ADoubleRearms(Bucket):
    def settle(self, message: Message, holder: str) -> tuple[Status, int]:
        record = self.holders.get(holder)
        if record is not None and record.seq == message.seq:
            record.expires_ms = self.now_ms + message.life_ms
        return super().settle(message, holder)


class TakesOlderMessages(Bucket):
    def settle(self, message: Message, holder: str) -> tuple[Status, int]:
        record = self.holders.get(holder)
        if record is not None and message.seq < record.seq:
            record.seq = message.seq - 1
        return super().settle(message, holder)


class TakesADoubleAgain(Bucket):
    def settle(self, message: Message, holder: str) -> tuple[Status, int]:
        record = self.holders.get(holder)
        if record is not None and message.seq == record.seq:
            record.seq = message.seq - 1
        return super().settle(message, holder)


class IgnoresTags(Bucket):
    """Entries that an earlier message told are applied again: a settle after conversion then counts them."""

    def settle(self, message: Message, holder: str) -> tuple[Status, int]:
        journal = [(1 << 40, *entry[1:]) for entry in message.journal]
        return super().settle(replace(message, journal=journal), holder)


class GivesAllBack(Bucket):
    def _give_back(self, slot: int, count: int) -> None:
        super()._give_back(slot, 99)


class GivesBackWhatWasKept(Bucket):
    """Tokens that the worker still holds are given back, and may be spent before the answer comes."""

    def settle(self, message: Message, holder: str) -> tuple[Status, int]:
        record = self.holders.get(holder)
        if record is None or record.live:
            return super().settle(message, holder)
        return super().settle(replace(message, keep=0), holder)


class GivesBackTwice(Bucket):
    """The record stays as it was converted."""

    def settle(self, message: Message, holder: str) -> tuple[Status, int]:
        record = self.holders.get(holder)
        converted = record is not None and not record.live and message.seq > record.seq
        result = super().settle(message, holder)
        if converted and record is not None:
            record.seq = message.seq
            self.holders[holder] = record
        return result


class GivesBackToTheCurrentSlot(Bucket):
    def _give_back(self, slot: int, count: int) -> None:
        super()._give_back(self.slot if self.ring.get(self.slot) else slot, count)


class ResetForgetsLeases(Bucket):
    def reset(self) -> None:
        super().reset()
        self.holders.clear()


class ResetKeepsConverted(Bucket):
    """What was converted before is given back after it, out of what was spent since."""

    def reset(self) -> None:
        self.ring.clear()
        self.spent = 0


class RefundsTwice(Bucket):
    def _refund(self, slot: int, count: int) -> None:
        super()._refund(slot, 2 * count)


class RefundsWhatHasLeft(Bucket):
    """The charge has left the window: another's is given back."""

    def _refund(self, slot: int, count: int) -> None:
        super()._refund(max(slot, self.slot - self.slots), count)


class NeverHolds(Store):
    """Grants at once after a loss."""

    def _judge_marker(self, call: Call, now_ms: int) -> tuple[str, int]:
        epoch, _ = super()._judge_marker(call, now_ms)
        assert self.marker is not None
        self.marker = (*self.marker[:2], 0)
        return epoch, 0


class TrustsTheRun(Store):
    """A rolled-back store is told by nothing but the marker that it kept."""

    def _judge_marker(self, call: Call, now_ms: int) -> tuple[str, int]:
        return super()._judge_marker(replace(call, run=""), now_ms)


class TrustsAnEmptyStore(Store):
    """A marker that is missing is a first start, whatever the caller knows, and nothing is held back at one."""

    def _judge_marker(self, call: Call, now_ms: int) -> tuple[str, int]:
        epoch, lost_ms = super()._judge_marker(replace(call, known=""), now_ms)
        return epoch.partition("@")[0], lost_ms


class DeadlineFromTheArrival(EagerLease):
    def answered(self, message: Message, answer: KeyAnswer, sent: float, now: float) -> None:
        super().answered(message, answer, now, now)
        self.offset_ms = answer.now_ms - sent * 1_000
        self.roll(now)


class SpendsForEver(EagerLease):
    def answered(self, message: Message, answer: KeyAnswer, sent: float, now: float) -> None:
        super().answered(message, answer, sent, now)
        if self.reserved:
            self.deadline = now + 60.0
        self.roll(now)


class MapsEarly(EagerLease):
    def answered(self, message: Message, answer: KeyAnswer, sent: float, now: float) -> None:
        super().answered(message, answer, sent, now)
        self.offset_ms = answer.now_ms - now * 1_000
        self.roll(now)


class ReturnsAfterSending(EagerLease):
    def message(self, now: float, waiting: int, need: int, closing: bool) -> Message:
        self.roll(now)
        has = self.has
        message = super().message(now, waiting, need, closing)
        if closing:
            self.has = self.opened = has
        return message


class ForgetsSpendsMeanwhile(EagerLease):
    def answered(self, message: Message, answer: KeyAnswer, sent: float, now: float) -> None:
        super().answered(message, answer, sent, now)
        self.journal = []


class ForgetsSpendsAtSending(EagerLease):
    def message(self, now: float, waiting: int, need: int, closing: bool) -> Message:
        message = super().message(now, waiting, need, closing)
        self.journal = []
        return message


class TagsEarly(EagerLease):
    """A spend is tagged with the seq before: the store takes it for one that was told."""

    def _note(self, now: float, slot: int, count: int, reserved: int) -> None:
        self.sent -= 1
        super()._note(now, slot, count, reserved)
        self.sent += 1


class NeverSaysBack(EagerLeases):
    """No roll call is ever begun (R1)."""

    def _seal(self, flight: Flight, now: float, *, closing: bool) -> Flight:
        super()._seal(flight, now, closing=closing).call.back = False
        return flight


class BelievesLateCalls(Store):
    """A call that was sent before the outage proves that its worker is here (R2)."""

    def _call_roll(self, call: Call, now_ms: int) -> tuple[int, int, str]:
        if self.roll is not None and not call.back:
            call = replace(call, roll=self.roll.id)
        return super()._call_roll(call, now_ms)


class MissesNobody(Store):
    """Nothing is reserved for who is not here (R3)."""

    def _call_roll(self, call: Call, now_ms: int) -> tuple[int, int, str]:
        return 0, *super()._call_roll(call, now_ms)[1:]


class NeverClips(EagerLease):
    """Who is alone spends its share beside what it leased before."""

    def clip(self, now: float) -> None:
        pass


class SuccessorsTakeAShare(EagerLease):
    """At once, whatever the one before admitted."""

    def room(self, now: float) -> int:
        self.worker.alone_from = float("-inf")
        return super().room(now)


class ForgetsWhatItLeased(EagerLease):
    """Alone it counts only what it admitted alone."""

    def admitted(self, now: float, count: int) -> None:
        if self.local(now):
            super().admitted(now, count)


ONE = Size(letters="rcbspodag", air=1)
KILLED = Size(letters="rcbspodagk", air=1, most={"k": 1})
DOUBLED = Size(letters="rcpdDagh", events="i", most={"D": 1, "h": 1})
OVERTAKEN = Size(letters="rcbpodnagk", most={"k": 1})
TWO = Size(workers=2, letters="rcpdg", air=1)
TWO_DOUBLED = Size(workers=2, letters="cpodDg", most=dict.fromkeys("Dpog", 1))
RESET = Size(letters="rcbspodag", events="z", air=1, most={"z": 1})
TWO_RESET = Size(workers=2, letters="rcpdg", events="z", air=1, most={"z": 1})
REFUNDED = Size(limit=3, letters="rcpdgfF", air=1, most={"f": 2, "F": 1})
REFUNDED_RESET = Size(limit=3, letters="rcpdgfF", events="z", air=1, most={"z": 1, "f": 2, "F": 1})
LOST = Size(letters="rcbspodag", events="vx", air=1, most={"v": 1})
EMPTIED = Size(letters="rcbspodag", events="e", air=1, most={"e": 1})
BACK = Size(letters="rcpdag", events="j", air=1, most={"j": 1}, lazy=True)

WORLDS = {
    "one worker": ONE,
    "killed": KILLED,
    "doubled": DOUBLED,
    "overtaken": OVERTAKEN,
    "two workers": TWO,
    "two workers, killed": Size(workers=2, letters="rcpdgk", air=1, most={"k": 1}),
    "three workers": Size(workers=3, limit=3, letters="rcpdg", air=1),
    "reset": RESET,
    "two workers, reset": TWO_RESET,
    "refunded": REFUNDED,
    "lost": LOST,
    "emptied": EMPTIED,
    "clock back": BACK,
    "limit of 4": Size(limit=4, letters="rcpodagk", air=1, most={"k": 1}),
    "two slots": Size(slots=2, letters="rcpodagk", air=1, most={"k": 1}),
}
"""Where the rules are searched."""


@dataclass(frozen=True)
class Fault:
    name: str
    rules: Rules
    size: Size
    path: str
    """The shortest that there is in that world."""

    @property
    def quick(self) -> bool:
        """Whether the search finds it within some seconds."""
        return len(self.path.split()) <= 8 and self.size.workers == 1


def _bucket(kind: type[Bucket], size: Size, path: str) -> Fault:
    return Fault(kind.__name__, Rules(bucket=kind), size, path)


def _store(kind: type[Store], size: Size, path: str) -> Fault:
    return Fault(kind.__name__, Rules(store=kind), size, path)


def _lease(kind: type[EagerLease], size: Size, path: str) -> Fault:
    return Fault(kind.__name__, Rules(lease=kind), size, path)


FAULTS = [
    _bucket(CountsKSlots, ONE, "t c0 c0 t c0"),
    _bucket(ConvertsIntoTheGrantsSlot, ONE, "t p0 d0 a0 t t r0 t c0 c0"),
    _bucket(ForgetsWhatExpired, KILLED, "p0 d0 a0 t t r0 k0 c0 t c0"),
    _bucket(DebitsAtTheGrant, ONE, "t p0 d0 a0 t t r0 c0 t c0"),
    _bucket(GrantsWhatOthersHold, KILLED, "b0 k0 c0 c0"),
    _bucket(GrantsBeyondWhatIsFree, ONE, "p0 d0 a0 p0 d0 a0 b0"),
    _bucket(ChargesEarly, ONE, "t b0 t c0 c0"),
    _bucket(ADoubleRearms, TWO_DOUBLED, "p0 D0 g0 t t t d0 t t c1 t c1 c0"),
    _bucket(TakesOlderMessages, OVERTAKEN, "o0 g0 b0 d0 k0 c0 c0"),
    _bucket(TakesADoubleAgain, DOUBLED, "p0 D0 a0 r0 h0 c0 i c0"),
    _bucket(IgnoresTags, REFUNDED, "c0 r0 c0 f0 p0 d0 g0 c0 c0"),
    _bucket(GivesAllBack, ONE, "p0 d0 a0 t t r0 t c0 c0"),
    _bucket(GivesBackWhatWasKept, KILLED, "p0 d0 a0 t p0 t r0 t d0 a0 r0 k0 c0"),
    _bucket(GivesBackTwice, ONE, "p0 d0 a0 t t t b0 c0 c0"),
    _bucket(GivesBackToTheCurrentSlot, TWO, "p0 d0 g0 t t t t t c1 c0 t c0"),
    _bucket(ResetForgetsLeases, RESET, "p0 d0 a0 p0 z d0 t t r0 a0 r0 t c0"),
    _bucket(ResetKeepsConverted, TWO_RESET, "p0 d0 g0 t t t z c1 c0 c0"),
    _bucket(RefundsTwice, REFUNDED, "c0 r0 c0 f0 c0 c0"),
    _bucket(RefundsWhatHasLeft, REFUNDED, "t c0 f0 t t r0 t c0 c0 c0"),
    _store(NeverHolds, LOST, "c0 v c0 x c0"),
    _store(TrustsTheRun, LOST, "c0 v c0 x c0"),
    _store(TrustsAnEmptyStore, EMPTIED, "c0 c0 e c0"),
    _lease(DeadlineFromTheArrival, KILLED, "p0 d0 t t t a0 t t r0 c0 t c0"),
    _lease(SpendsForEver, ONE, "p0 d0 a0 t t t t t r0 c0 t c0"),
    _lease(MapsEarly, ONE, "t p0 d0 t t a0 r0 c0 t c0"),
    _lease(ReturnsAfterSending, KILLED, "p0 d0 a0 o0 r0 d0 k0 c0 c0"),
    _lease(ForgetsSpendsMeanwhile, ONE, "p0 d0 a0 p0 r0 d0 a0 c0 c0"),
    _lease(ForgetsSpendsAtSending, ONE, "b0 s0 g0 c0 c0"),
    _lease(TagsEarly, ONE, "b0 c0 c0"),
    Fault("TakesAnswersOfTheGivenUp", Rules(late_answers=True), OVERTAKEN, "p0 g0 o0 d0 r0 d0 k0 c0 c0"),
    Fault("AnIdComesAgain", Rules(holder=lambda place, born: f"pod{place}"), KILLED, "b0 k0 b0 c0"),
]


def absent(
    workers: int, limit: int, slots: int, more: str = "", *, told: bool = True, anytime: bool = False
) -> Size:
    """A world whose store is away once, for all, and comes back. `more` letters are for the killed."""
    most = {"w": 1} | dict.fromkeys(more.replace("u", ""), 2)
    letters = f"rcbpodnagq{more}"
    return Size(workers, limit, slots, letters, "wy", most, mode="safe", told=told, anytime=anytime)


ABSENCES = {
    "two workers": absent(2, 2, 1),
    "two slots": absent(2, 4, 2),
    "three workers": absent(3, 4, 1),
    "four slots": absent(3, 5, 4),
    "four workers": absent(4, 4, 1),
    "killed": absent(2, 4, 4, "Kku"),
    "three workers, killed": absent(3, 3, 1, "Kku"),
    "killed, untold": absent(3, 4, 2, "Ku", told=False),
    "killed at any time": absent(3, 3, 1, "k", anytime=True),
}
"""Where the rules for an absence are walked.

The end of the absence costs nothing beyond the limit if each worker tells within the time of the roll call
(`punctual`), who is first to return knows of the fleet (`told`), none is killed before it told (of each that is, a
share may be admitted twice: `World.lost`), and none comes between the store's return and the end of the roll call
(`anytime`): a newcomer says nothing of an absence, and counts for one that is missed. Without the last or `told`, a
window that holds the end is bounded as one that holds the beginning is, and by a share for each that was killed."""

ABSENT_FAULTS = [
    Fault("NeverSaysBack", Rules(leases=NeverSaysBack), ABSENCES["two slots"], "w t r1 r1 t t y q0 b0 t c0"),
    _store(BelievesLateCalls, ABSENCES["two slots"], "o1 g1 w t y r1 r0 r1 q1 t r0 t d1 q0 t b0"),
    _store(MissesNobody, ABSENCES["three workers"], "w t y r0 q1 b1 t c1 r2"),
    _lease(NeverClips, Size(4, 4, 1, "rpdaq", "wy", {"w": 1}, mode="safe"), "p0 d0 a0 w t t r0 r0 r1 r2 r3"),
    _lease(SuccessorsTakeAShare, ABSENCES["killed"], "c0 b0 c0 w k0 r0 r0 r1"),
    _lease(ForgetsWhatItLeased, ABSENCES["two slots"], "b1 b1 p1 w r1 r0 r1 r0"),
]
"""The paths are as short as they were made from walks; others may be shorter."""
