"""ComCAT: smaller vision transformers by factoring attention head by head, and the MLP and classifier layer by layer.

Xiao, Yin, Gong, Zang, Ren, Yuan: "COMCAT: Towards Efficient Compression and Customization of Attention-Based Vision
Models", ICML 2023, arXiv 2305.17235. Covers its Eq. 1 to 6 and, with `Schedule(adaptive=True)`,
Adaptive-ComCAT (The Visual Computer; after its released code and log).

    plan = comcat.greedy(model, comcat.authors_budget(model, 0.5), statistics=comcat.calibrate(model, batches))
    comcat.apply(model, plan)                                      # physically smaller, in place
    comcat.refit(model, original, batches)                         # closed form, no gradient
    train.fit(model, ..., loss=comcat.authors_loss(original)); comcat.save(model, path)

Rooms: `comcat_plan` (parts and plans), `comcat_cut` (apply, save, load), `comcat_factors` (the SVDs), `comcat_modules`
(what is put in), `comcat_calibrate` (data-aware factors), `comcat_ranks` (counts, budgets, greedy ranks),
`comcat_search` with `comcat_supernet`, `comcat_recut` and `comcat_schedule` (the search of both papers;
`comcat_mixture` is the authors' super-network), `comcat_recover` (closed-form re-fit), `comcat_diffusion` (the adapter
for diffusion models).

The scores of head i hold the product `W_QK = W_Q W_K^T`, its output the product `W_VO = W_V W_O`, both of rank d_h at
most. Truncated SVDs of the two give an attention of the same form with narrower heads: queries and keys r1 wide, values
r2 wide (paper, Eq. 1 to 3); the scores are still divided by the square root of the original d_h. A linear layer becomes
two, with its bias on the second.

Known divergences from the authors' released code (`mode="faithful"` does as they do):
* all biases of the attention are absorbed exactly (specification 1.3); the released code throws them away;
* the singular values are shared by both factors; the released code puts them into the right one;
* a linear layer whose rank would not make it smaller stays dense; the released search picks ranks that enlarge it.
Dropout on the attention weights breaks the absorption of the values' bias in training; `apply` says so.

Where something stands between the queries' and keys' products (QK-norm, rotary positions) only W_VO, MLP and classifier
are factored; where a norm stands behind the values, W_VO is not.
"""

from leanvit.comcat_calibrate import Statistics, calibrate, spectra
from leanvit.comcat_cut import apply, load, save
from leanvit.comcat_plan import BIASES, MODES, Part, Plan, make_plan, model_name, part_of, parts, plan_of
from leanvit.comcat_ranks import (
    LOGGED_DEIT_S,
    authors_budget,
    greedy,
    ranks_from_list,
    sensitivity,
    total_weights,
    uniform_ranks,
)
from leanvit.comcat_recover import authors_loss, refit
from leanvit.comcat_schedule import Schedule
from leanvit.comcat_search import RankSearch, search

__all__ = [
    "BIASES", "LOGGED_DEIT_S", "MODES", "Part", "Plan", "RankSearch", "Schedule", "Statistics", "apply",
    "authors_budget", "authors_loss", "calibrate", "greedy", "load", "make_plan", "model_name", "part_of", "parts",
    "plan_of", "ranks_from_list", "refit", "save", "search", "sensitivity", "spectra", "total_weights",
    "uniform_ranks",
]  # fmt: skip
