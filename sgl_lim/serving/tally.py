"""What became of drafts, counted on the host when SGLang has looked at a round's results."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

TALLIED = {
    "draft_rounds": "Rounds of a batch that drafted and verified",
    "plain_rounds": "Rounds of a batch that decoded densely, because drafting would not have won",
    "verifications": "Verifications, over requests: each answers the drafts that it accepts, and one token more",
    "drafts_proposed": "Tokens drafted, over requests",
    "drafts_accepted": "Drafted tokens that the dense model accepted",
}
"""What a lossless server counts, by the name under which `/server_info` and `/metrics` show it."""


@dataclass
class Tally:
    """Totals since the server started. A request that had finished before its round was looked at counts too."""

    draft_rounds: int = 0
    plain_rounds: int = 0
    verifications: int = 0
    drafts_proposed: int = 0
    drafts_accepted: int = 0

    def learn(self, drafts: int, accepted: Iterable[int]) -> None:
        """A round of so many drafts, 0 for a plain one, and how many of them each request accepted."""
        if drafts == 0:
            self.plain_rounds += 1
            return
        counts = list(accepted)
        self.draft_rounds += 1
        self.verifications += len(counts)
        self.drafts_proposed += drafts * len(counts)
        self.drafts_accepted += sum(counts)

    def totals(self) -> dict[str, int]:
        """Totals by name, as `TALLIED` has them."""
        return asdict(self)
