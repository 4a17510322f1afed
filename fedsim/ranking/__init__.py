"""Recommendation: which item of each user is held out, and how well an order of items would have guessed it."""

from fedsim.ranking.evaluation import RankItems, Scorer
from fedsim.ranking.measures import hit_rate, ndcg, rank
from fedsim.ranking.negatives import draw_negatives, draw_others
from fedsim.ranking.splitting import DRAWN, KNOWN, WANTED, leave_one_out

__all__ = [
    "DRAWN",
    "KNOWN",
    "WANTED",
    "RankItems",
    "Scorer",
    "draw_negatives",
    "draw_others",
    "hit_rate",
    "leave_one_out",
    "ndcg",
    "rank",
]
