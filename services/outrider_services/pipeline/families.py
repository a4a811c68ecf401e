"""The metrics that there are, without prefix; `metrics` counts, and `exposition` tells them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: what it is, and by which labels it is told apart."""

    kind: Literal["counter", "gauge", "histogram", "info"]
    help: str
    labels: tuple[str, ...] = ()


FAMILIES = {
    "spec_decode_num_drafts_total": Family(
        "counter", "Verify rounds: a request's share of a target pass, with drafted tokens"
    ),
    "spec_decode_num_draft_tokens_total": Family("counter", "Drafted tokens that were verified"),
    "spec_decode_num_accepted_tokens_total": Family(
        "counter", "Verified tokens that were accepted"
    ),
    "spec_decode_num_accepted_tokens_per_pos_total": Family(
        "counter", "Accepted tokens by their position in the block", ("position",)
    ),
    "spec_decode_num_created_draft_tokens_total": Family(
        "counter", "Drafted tokens that came from the draft worker"
    ),
    "spec_decode_num_discarded_draft_tokens_total": Family(
        "counter", "Drafted tokens that were not used", ("reason",)
    ),
    "spec_decode_num_hits_total": Family(
        "counter", "Drafted tokens equal to the target's own, and not verified"
    ),
    "truncated_tokens_total": Family("counter", "Accepted tokens behind the end of the answer"),
    "target_tokens_total": Family(
        "counter", "Tokens of answers that were the target's own", ("kind",)
    ),
    "prompt_tokens_total": Family("counter", "Tokens of the prompts that were read"),
    "prompt_tokens_cached_total": Family(
        "counter", "Those of them that the target had read before, for another request"
    ),
    "generation_tokens_total": Family("counter", "Tokens of answers"),
    "request_success_total": Family(
        "counter", "Requests that ended as they should", ("finished_reason",)
    ),
    "request_failure_total": Family("counter", "Requests that ended with an error", ("code",)),
    "request_resumed_total": Family(
        "counter", "Times that a request went on after what it had lost", ("lost",)
    ),
    "num_requests_running": Family("gauge", "Requests that have a sequence"),
    "num_requests_waiting": Family(
        "gauge", "Requests that wait for one, their prompts being known"
    ),
    "lane_busy_seconds_total": Family("counter", "Time in which the worker computed", ("lane",)),
    "lane_passes_total": Family("counter", "Evaluations of the worker", ("lane",)),
    "lane_wait_seconds_total": Family(
        "counter", "Time in which the worker was idle although requests ran", ("lane", "on")
    ),
    "overlap_seconds_total": Family(
        "counter", "Time in which both workers computed, as their messages show it"
    ),
    "draft_seconds": Family("histogram", "Drafting one token"),
    "verify_seconds": Family("histogram", "The target's pass of a round"),
    "link_rtt_seconds": Family(
        "histogram", "From the coordinator to the worker and back", ("role",)
    ),
    "time_to_first_token_seconds": Family("histogram", "From the request to its first token"),
    "inter_token_latency_seconds": Family(
        "histogram", "Gap between blocks by the tokens of the later one, once per token"
    ),
    "e2e_request_latency_seconds": Family(
        "histogram", "From the request to its end, if it succeeded"
    ),
    "stale_dropped_total": Family(
        "counter", "What workers said of requests that was not the answer awaited", ("reason",)
    ),
    "worker_up": Family("gauge", "Workers of the role that are there", ("role",)),
    "worker_restarts_total": Family(
        "counter", "Workers that took the place of an earlier one", ("role",)
    ),
    "info": Family("info", "Version and models", ("version", "target", "draft")),
}
