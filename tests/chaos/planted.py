"""Bugs to plant, each in a line or two of our own code, and the quick test that must catch it.

A test that cannot fail proves nothing. Each bug here is one that somebody might write, and its test
runs against it in a child process: see `planting` and `scripts/chaos --only planted`.
"""

from __future__ import annotations

from dataclasses import dataclass

CORE, WIRE = "shared/outrider/core", "shared/outrider/wire"
PIPELINE, GATEWAY = "services/outrider_services/pipeline", "services/outrider_services/gateway"
ORDERS, BESIDE = "tests/unit/test_orders.py", "tests/unit/test_beside.py"
SESSION, TARGET = "tests/unit/test_session.py", "tests/unit/test_target_worker.py"
COORDINATOR, ROSTER = "tests/unit/test_coordinator.py", "tests/unit/test_roster.py"
WORLDS = "tests/sim/test_worlds.py::test_whatever_happens_every_answer_is_the_targets_own"


@dataclass(frozen=True, slots=True)
class Bug:
    """`old` becomes `new` in `file`, where it stands once; `test` is to fail then."""

    name: str
    file: str
    old: str
    new: str
    test: str


BUGS = (
    # ---- what was drafted for another text ------------------------------------------------------
    Bug(
        "the lineage of a proposal is not compared",
        f"{CORE}/stock.py",
        "return proposal.lineage == self.lineage and follows",
        "return follows",
        f"{SESSION}::test_garbage_is_not_taken_and_the_third_piece_closes_the_draft",
    ),
    Bug(
        "what an old lineage sends is taken",
        f"{CORE}/session.py",
        "if proposal.lineage < self.stock.lineage:",
        "if False:",
        f"{SESSION}::test_what_a_broken_lineage_still_sends_is_counted_and_dropped",
    ),
    Bug(
        "a correction begins no lineage",
        f"{CORE}/stock.py",
        "        self.lineage += 1\n        self._next = where + 1\n        return void",
        "        self._next = where + 1\n        return void",
        f"{SESSION}::test_a_correction_voids_all_that_was_drafted_behind_it",
    ),
    Bug(
        "the stock outlives a correction",
        f"{CORE}/stock.py",
        "        self.drafted, self.sides = [], ()\n",
        "        self.sides = ()\n",
        f"{SESSION}::test_a_correction_voids_all_that_was_drafted_behind_it",
    ),
    Bug(
        "sides outlive their lineage",
        f"{CORE}/stock.py",
        "        self.drafted, self.sides = [], ()\n",
        "        self.drafted = []\n",
        f"{BESIDE}::test_a_side_that_was_right_ends_the_lineage_where_it_begins",
    ),
    Bug(
        "a block is accepted whole though a side was right",
        f"{PIPELINE}/target_worker.py",
        " and not verdict.side\n",
        "\n",
        f"{BESIDE}::test_an_order_that_follows_a_block_is_void_where_a_side_was_right",
    ),
    Bug(
        "a side is judged by another one's rows",
        f"{PIPELINE}/verifying.py",
        "        begins = share.rows + sum(lengths[: number - 1])\n",
        "        begins = share.rows\n",
        f"{BESIDE}::test_with_sides_of_every_kind_the_text_is_the_targets_own",
    ),
    Bug(
        "a side that was right leaves the block's rest in the cache",
        f"{PIPELINE}/verifying.py",
        "            held = sequence.sides[verdict.side - 1].place\n",
        "            return\n",
        f"{BESIDE}::test_with_sides_of_every_kind_the_text_is_the_targets_own",
    ),
    Bug(
        "the draft keeps what it drafted for a text that has changed",
        f"{CORE}/stream.py",
        "        if begun.lineage != self.lineage:\n            return ()\n",
        "",
        "tests/unit/test_stream.py::test_what_was_drafted_counts_only_for_the_text_that_it_was_drafted_for",
    ),
    Bug(
        "a commit that does not follow is believed",
        f"{PIPELINE}/draft_worker.py",
        "        if stream.committed != order.base:\n            return\n",
        "",
        "tests/unit/test_draft_worker.py::test_a_commit_that_does_not_follow_is_not_believed",
    ),
    Bug(
        "a draft that went back farther is taken to have read what it has to read again",
        f"{PIPELINE}/draft_worker.py",
        "read=min(begun.read, self.model.read(ride.slot))",
        "read=begun.read",
        "tests/unit/test_draft_worker.py::test_a_drafter_that_goes_back_farther_than_asked_reads_again_and_drafts_on",
    ),
    Bug(
        "what taking back costs is not counted",
        f"{CORE}/estimates.py",
        " + self.rollback_s * (1 - accepted)",
        "",
        "tests/unit/test_price.py::test_the_dearer_taking_back_is_the_less_is_gained_and_the_shorter_are_the_blocks",
    ),
    # ---- what the target says -------------------------------------------------------------------
    Bug(
        "refused tokens stay in the target's cache",
        f"{CORE}/reference.py",
        "        target.rewind(0, len(text) - 1)",
        "        pass",
        "tests/unit/test_reference.py::test_the_text_is_the_targets_however_much_is_drafted",
    ),
    Bug(
        "refused tokens stay in the draft's cache",
        "shared/outrider/engines/drafter.py",
        "        if self._engine.length(slot) > kept:",
        "        if False:",
        "tests/unit/test_drafter.py::test_cut_back_it_goes_on_from_the_other_text",
    ),
    Bug(
        "noise is keyed by the committed length, not by the position",
        f"{CORE}/constraints.py",
        "return sampling_.decide(row, sampling, history, len(history), breakers)\n    answer",
        "return sampling_.decide(row, sampling, history, begins, breakers)\n    answer",
        WORLDS,
    ),
    Bug(
        "each row is judged by the committed text alone",
        f"{PIPELINE}/verifying.py",
        "            history.extend(drafted[at : at + 1])",
        "            pass",
        WORLDS,
    ),
    Bug(
        "the noise of two positions is the same",
        f"{CORE}/noise.py",
        "^ np.uint64(position))",
        "^ np.uint64(position // 2))",
        "tests/unit/test_sampling.py::test_the_noise_never_changes",
    ),
    Bug(
        "the base is shifted by one",
        f"{CORE}/dispatch.py",
        "base = len(self._now.tokens) + begin\n",
        "base = len(self._now.tokens) + begin + 1\n",
        WORLDS,
    ),
    Bug(
        "a verdict counts twice",
        f"{CORE}/dispatch.py",
        "        if verdict.base != len(self._now.tokens):\n            return None\n",
        "",
        f"{SESSION}::test_a_verdict_of_another_round_or_base_is_ignored",
    ),
    Bug(
        "an order ahead is not compared with what the target has chosen",
        f"{CORE}/orders.py",
        "if is_void or known[: len(drafted)] != drafted[: len(known)]:",
        "if is_void:",
        f"{ORDERS}::test_else_it_is_dropped_with_all_that_follow",
    ),
    Bug(
        "what follows a block that was not accepted whole is verified",
        f"{CORE}/orders.py",
        "return order.follows and self._broken >= order.round - 1",
        "return False",
        f"{ORDERS}::test_else_it_is_dropped_with_all_that_follow",
    ),
    Bug(
        "a verdict that did not come is waited for",
        f"{CORE}/session.py",
        "        self.missed += 1\n",
        "        return []\n",
        WORLDS,
    ),
    Bug(
        "an impossible verdict is believed",
        f"{CORE}/decoding.py",
        "    if accepted > block or not (ended or len(tokens) == accepted + 1):",
        "    if False:",
        f"{SESSION}::test_an_impossible_verdict_fails_the_request",
    ),
    Bug(
        "text goes on behind an end token",
        f"{CORE}/decoding.py",
        "        if choice in ends:",
        "        if False:",
        "tests/unit/test_decoding.py::test_a_verdict",
    ),
    # ---- what a peer's number can reach ---------------------------------------------------------
    Bug(
        "a drafted id may be any number",
        f"{CORE}/draft_record.py",
        "            and all(one.token < vocabulary for one in proposal.drafted)\n",
        "",
        f"{SESSION}::test_garbage_is_not_taken_and_the_third_piece_closes_the_draft",
    ),
    Bug(
        "a draft may run as far as it likes",
        f"{CORE}/draft_record.py",
        "            and len(proposal.drafted) <= self.granted - proposal.position\n",
        "",
        f"{SESSION}::test_just_as_far_as_its_lead_a_draft_may_go",
    ),
    Bug(
        "a draft that offends is never closed",
        f"{CORE}/session.py",
        "        if self.draft.offences < OFFENCES:",
        "        if True:",
        f"{SESSION}::test_garbage_is_not_taken_and_the_third_piece_closes_the_draft",
    ),
    Bug(
        "ids on the wire have no bounds",
        f"{CORE}/values.py",
        "TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]",
        "TokenId: TypeAlias = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]",
        "tests/unit/test_wire.py::test_a_token_is_a_small_integer",
    ),
    Bug(
        "only one kind of decoding error is caught",
        f"{WIRE}/codec.py",
        "    except Exception as exc:\n        if greeting",
        "    except msgspec.ValidationError as exc:\n        if greeting",
        "tests/unit/test_wire.py::test_what_is_not_a_message_is_a_protocol_error",
    ),
    Bug(
        "a frame may be as long as it likes",
        f"{WIRE}/codec.py",
        "        if len(frame) > FRAME_LIMIT:\n            raise ValueError",
        "        if False:\n            raise ValueError",
        "tests/unit/test_wire.py::test_the_longest_frame_is_taken_and_a_byte_more_is_not",
    ),
    Bug(
        "fields that nobody knows are passed over",
        f"{CORE}/values.py",
        "array_like=True, forbid_unknown_fields=True)",
        "array_like=True)",
        "tests/unit/test_wire.py::test_what_is_not_a_message_is_a_protocol_error",
    ),
    # ---- somebody does not read, answer, or live ------------------------------------------------
    Bug(
        "what waits for a peer has no limit",
        f"{WIRE}/transport.py",
        "        if waiting.size > self._limit(peer):",
        "        if False:",
        "tests/unit/test_transport.py::test_a_peer_that_does_not_read_is_held_up_to_and_then_let_go",
    ),
    Bug(
        "bad frames are forgiven without end",
        f"{WIRE}/connections.py",
        "        return left >= 1.0",
        "        return True",
        "tests/unit/test_connections.py::test_bad_frames_are_counted_by_origin_and_forgiven_with_time",
    ),
    Bug(
        "a late draft is waited for without end",
        f"{CORE}/session.py",
        "        if self.deadline is None or now < self.deadline:",
        "        if True:",
        f"{SESSION}::test_a_late_draft_is_waited_for_until_the_deadline_and_not_again",
    ),
    Bug(
        "a worker that makes no progress is kept",
        f"{PIPELINE}/roster.py",
        "            elif now - member.moved > member.stall_s():",
        "            elif False:",
        f"{ROSTER}::test_one_that_beats_but_does_not_progress_is_dropped",
    ),
    Bug(
        "whoever was paused judges before it reads",
        f"{PIPELINE}/roster.py",
        "            if now - before > SILENT_S:",
        "            if False:",
        f"{ROSTER}::test_whoever_was_paused_reads_before_it_judges_others",
    ),
    # ---- leaks ----------------------------------------------------------------------------------
    Bug(
        "the target keeps the sequence of a request that was closed",
        f"{PIPELINE}/target_worker.py",
        "        self.slots.give_back(sequence.slot, sequence.tokens)\n",
        "",
        WORLDS,
    ),
    Bug(
        "the draft keeps the sequence of a request that was closed",
        f"{PIPELINE}/draft_worker.py",
        "        self.slots.give_back(ride.slot, ride.stream.tokens[: ride.stream.read])\n",
        "",
        WORLDS,
    ),
    Bug(
        "what one name has brought is used for another",
        f"{PIPELINE}/slots.py",
        "cache is None or holder.cache != cache or",
        "",
        "tests/unit/test_slots.py::test_what_one_name_has_brought_is_never_used_for_another",
    ),
    # ---- who may say what -----------------------------------------------------------------------
    Bug(
        "anybody may answer a question",
        f"{PIPELINE}/calls.py",
        "        if asked != peer:\n            return False\n",
        "",
        f"{ROSTER}::test_somebody_else_cannot_answer",
    ),
    Bug(
        "a stranger may take a worker's place",
        f"{PIPELINE}/roster.py",
        "return token is None or hmac.compare_digest(token.encode(), hello.token.encode())",
        "return True",
        f"{ROSTER}::test_only_our_own_workers_join_where_we_start_them",
    ),
    Bug(
        "others may enter the directory of the sockets",
        f"{WIRE}/addresses.py",
        " or status.st_mode & 0o077:",
        ":",
        "tests/unit/test_addresses.py::test_a_directory_that_others_can_enter_is_refused",
    ),
    Bug(
        "any key opens the gateway",
        f"{GATEWAY}/access.py",
        "if not any([hmac.compare_digest(hashed, one) for one in self.keys]):",
        "if not hashed:",
        "tests/unit/test_gateway_access.py::test_a_key_is_asked_for_where_there_are_some",
    ),
    Bug(
        "the header of a model file is believed",
        "services/outrider_services/models/gguf.py",
        "    if size < header.promised_bytes:",
        "    if False:",
        "tests/unit/test_gguf.py::test_a_truncated_file_is_told_both_sizes",
    ),
)
BY_NAME = {bug.name: bug for bug in BUGS}
FEW = (BUGS[1], BUGS[8], BUGS[14], BUGS[19], BUGS[26])  # for every test run: one of each kind
