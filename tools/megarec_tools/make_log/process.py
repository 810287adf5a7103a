"""Makes the listens of a range of users, all users a step at a time."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megarec_tools.make_log import reaction
from megarec_tools.make_log.catalog import Catalog
from megarec_tools.make_log.choice import choose_items, genre_ends_of
from megarec_tools.make_log.config import MakeLogConfig
from megarec_tools.make_log.draws import Bools, Draws, Floats, Ints
from megarec_tools.make_log.state import EMPTY, State, push, slot_to_lose

COUNTERS_PER_USER = 1 << 24  # events of one user that have random numbers of their own
MAX_MEAN_LENGTHS = 32  # no user is longer than this many mean lengths
LATEST_BEGIN = 0.3  # users join in the first 30 % of the time and leave in the last 10 %
EARLIEST_END = 0.9
SESSION_GAP_SECONDS = 1_800.0  # at least
ORGANIC_SESSIONS = 0.51
ORGANIC_FLIPS = 0.1  # share of listens that are not as their session is
BATCHED = 0.085  # share of listens that the player reports together with the one before
MIN_PAUSE_SECONDS = 0.5
MAX_PAUSE_SECONDS = 4.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is fixed about each user before the first step; rows are users, the longest first.

    Event `t` of row `r` is `e = offset[r] + t`, user by user in the order of their numbers. `begins[e]` marks the
    events that start a session, `session[e]` is the number of the session, under which `session_time` says when it is
    due, in seconds, and `engagement` how it goes; `organic[e]` is the context.
    """

    user: Ints
    length: Ints
    offset: Ints
    bias: Floats
    taste_now: Floats
    taste_turned: Floats
    begins: Bools
    session: Ints
    session_time: Floats
    engagement: Floats
    organic: Bools


@dataclass(frozen=True, kw_only=True)
class Listens:
    """The listens of some users, user by user in the order of their numbers.

    `user`, `last_event`, `last` and `p_listened` have one row per user: the state just before the user's last listen,
    the time of that listen included, and the true probability that it reaches half of the item.
    """

    event_user: Ints
    item: Ints
    time: Ints
    ratio: Ints
    organic: Bools
    was_favourite: Bools
    user: Ints
    last_event: Ints
    last: State
    p_listened: Floats


def make_plan(config: MakeLogConfig, draws: Draws, users: Ints) -> Plan:
    """Lengths, sessions and tastes of `users`."""
    mean, sigma = config.num_events / config.num_users, config.length_sigma
    drawn = mean * np.exp(sigma * draws.normal("length", users) - sigma**2 / 2)
    length = np.rint(drawn).clip(1, min(MAX_MEAN_LENGTHS * mean, COUNTERS_PER_USER - 1)).astype(np.int64)
    first = np.cumsum(length) - length
    step = np.arange(int(length.sum())) - np.repeat(first, length)
    counter = np.repeat(users * COUNTERS_PER_USER, length) + step

    begins = draws.uniform("session begins", counter) < 1.0 / config.session_events
    begins[first] = True
    session = np.cumsum(begins) - 1
    first_session = session[first]
    num_sessions = np.diff(np.append(first_session, session[-1] + 1))
    in_user = np.arange(num_sessions.sum()) - np.repeat(first_session, num_sessions)
    session_counter = np.repeat(users * COUNTERS_PER_USER, num_sessions) + in_user
    begin = LATEST_BEGIN * draws.uniform("first day", users)
    end = 1.0 - (1.0 - EARLIEST_END) * draws.uniform("last day", users)
    share = (in_user + draws.uniform("session time", session_counter)) / np.repeat(num_sessions, num_sessions)
    organic = (draws.uniform("organic session", session_counter) < ORGANIC_SESSIONS)[session]
    organic ^= draws.uniform("organic flip", counter) < ORGANIC_FLIPS

    rows = np.argsort(-length, kind="stable")
    genres = users[rows, None] * config.num_genres + np.arange(config.num_genres)
    return Plan(
        user=users[rows],
        length=length[rows],
        offset=first[rows],
        bias=reaction.BIAS_DEVIATION * draws.normal("bias", users[rows]),
        taste_now=draws.normal("taste now", genres),
        taste_turned=draws.normal("taste turned", genres),
        begins=begins,
        session=session,
        session_time=config.duration_seconds
        * (np.repeat(begin, num_sessions) + np.repeat(end - begin, num_sessions) * share),
        engagement=draws.normal("engagement", session_counter),
        organic=organic,
    )


def make_listens(
    config: MakeLogConfig, catalog: Catalog, draws: Draws, users: Ints, *, advance: Callable[[int], object]
) -> Listens:
    """All listens of `users`; `advance` is told how many each step has made."""
    plan = make_plan(config, draws, users)
    state = State.new(len(users), catalog.num_genres)
    num_events, num_steps = len(plan.begins), int(plan.length[0])
    item, time, ratio = (np.empty(num_events, dtype=np.int64) for _ in range(3))
    was_favourite = np.empty(num_events, dtype=np.bool_)
    p_listened = np.empty(len(users))
    active = len(users) - np.searchsorted(plan.length[::-1], np.arange(num_steps + 1), side="right")
    for step in range(num_steps):
        here, ahead = slice(int(active[step])), slice(int(active[step + 1]))
        now, event = state.rows(here), plan.offset[here] + step
        counter = plan.user[here] * COUNTERS_PER_USER + step
        _begin_sessions(config, catalog, plan, now=now, event=event)
        items = choose_items(
            catalog,
            now,
            way=draws.uniform("way", counter),
            genre=draws.uniform("genre", counter),
            item=draws.uniform("item", counter),
        )
        logit = reaction.listening_logit(catalog, now, item=items, organic=plan.organic[event], bias=plan.bias[here])
        p_listened[here] = 1.0 / (1.0 + np.exp(-logit))
        ratios = reaction.played_ratio(p_listened[here], draws.uniform("reaction", counter))
        favourite = reaction.is_favourite(now, items)
        item[event], time[event], ratio[event], was_favourite[event] = items, now.time, ratios, favourite.any(axis=1)
        # A user at the last event keeps the state before it, which the oracle wants.
        ahead_state = state.rows(ahead)
        _remember(catalog, ahead_state, item=items[ahead], ratio=ratios[ahead], favourite=favourite[ahead])
        _pass_time(
            catalog, ahead_state, items[ahead], played=ratios[ahead], pause=draws.uniform("pause", counter[ahead])
        )
        advance(len(event))
    back = np.argsort(plan.offset)
    return Listens(
        event_user=np.repeat(users, plan.length[back]),
        item=item,
        time=time,
        ratio=ratio,
        organic=plan.organic,
        was_favourite=was_favourite,
        user=users,
        last_event=(plan.offset + plan.length - 1)[back],
        last=state.rows(back),
        p_listened=p_listened[back],
    )


def _begin_sessions(config: MakeLogConfig, catalog: Catalog, plan: Plan, *, now: State, event: Ints) -> None:
    """Users whose event starts a session: time passes, recent artists and mood are forgotten, the taste has turned."""
    row = np.flatnonzero(plan.begins[event])
    session = plan.session[event[row]]
    now.time[row] = np.maximum(plan.session_time[session], now.time[row] + SESSION_GAP_SECONDS)
    now.engagement[row] = plan.engagement[session]
    now.recent[row] = EMPTY
    now.mood[row] = EMPTY
    angle = 2.0 * np.pi * config.taste_drift / config.duration_seconds * now.time[row, None]
    now.taste[row] = np.cos(angle) * plan.taste_now[row] + np.sin(angle) * plan.taste_turned[row]
    now.genre_ends[row] = genre_ends_of(catalog, now.taste[row], config.taste_strength)


def _remember(catalog: Catalog, state: State, *, item: Ints, ratio: Ints, favourite: Bools) -> None:
    """What a listen leaves behind. Listened: its artist is the newest recent one. Skipped: its artist is forgotten."""
    genre, listened = catalog.genre[item], ratio >= reaction.HALF
    same = reaction.same_artist(catalog, state, item)
    state.recent[same & ~listened[:, None]] = EMPTY
    state.favourites[favourite & ~listened[:, None]] = EMPTY
    state.mood[~listened & (genre == state.mood)] = EMPTY
    state.mood[:] = np.where(listened & (state.mood == EMPTY), genre, state.mood)

    row = np.flatnonzero(listened)
    recent = state.recent[row]
    state.recent[row] = push(recent, item[row], at=slot_to_lose(recent, preferred=same[row]))
    row = np.flatnonzero((ratio > reaction.FULL) & ~favourite.any(axis=1))
    favourites = state.favourites[row]
    state.favourites[row] = push(favourites, item[row], at=slot_to_lose(favourites))


def _pass_time(catalog: Catalog, state: State, item: Ints, *, played: Ints, pause: Floats) -> None:
    """The next item begins after this one has played and a pause, or at the same time in a batched report."""
    wait = MIN_PAUSE_SECONDS + (MAX_PAUSE_SECONDS - MIN_PAUSE_SECONDS) * pause
    state.time[:] += np.where(pause < BATCHED, 0.0, played / 100.0 * catalog.seconds[item] + wait)
