"""What Redis is asked to do, as Lua: each script runs alone and as a whole, so that nobody sees or makes half a change.

Every command that may be refused (a key of another type, no memory left, a replica, a user who may not) is tried before
the first one that changes a record. `KEYS` share one hash tag, so a single node of a Redis cluster may hold them too.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Script:
    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest)


REMEMBERED_MILLISECONDS = 60_000
"""How long Redis remembers how a change went, for a frontend that lost the answer."""

_CLOCK = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
"""

READ = Script(
    """
-- KEYS: records.  ARGV: most records, bytes of a key, of a value, of all
local count = redis.call('HLEN', KEYS[1])
if count > tonumber(ARGV[1]) then return {-1, count} end
local all, found, left_out, bytes = redis.call('HGETALL', KEYS[1]), {0}, 0, 0
for i = 1, #all, 2 do
  if #all[i] > tonumber(ARGV[2]) or #all[i + 1] > tonumber(ARGV[3]) then
    left_out = left_out + 1
  else
    bytes = bytes + #all[i] + #all[i + 1]
    found[#found + 1] = all[i]
    found[#found + 1] = all[i + 1]
  end
end
if bytes > tonumber(ARGV[4]) then return {-2, bytes} end
found[1] = left_out
return found
"""
)

APPLY = Script(
    f"""
-- KEYS: records, mark, how this change went.
-- ARGV: the latest time in ms, the mark, channel, most records, then key, before, after; '' is none, else '=' and text
local past = redis.call('GET', KEYS[3])
if past and past ~= 'begun' then return past end
{_CLOCK}
if now > tonumber(ARGV[1]) then return 'late' end
local function refused(word)
  redis.pcall('SET', KEYS[3], word, 'PX', {REMEMBERED_MILLISECONDS})
  return word
end
local more = 0
for i = 5, #ARGV, 3 do
  local there = redis.call('HGET', KEYS[1], ARGV[i])
  if (there and '=' .. there or '') ~= ARGV[i + 1] then return refused('quicker') end
  if ARGV[i + 1] == '' then more = more + 1 end
  if ARGV[i + 2] == '' then more = more - 1 end
end
if more > 0 and redis.call('HLEN', KEYS[1]) + more > tonumber(ARGV[4]) then return refused('full') end
redis.call('SET', KEYS[3], 'begun', 'PX', {REMEMBERED_MILLISECONDS})
redis.call('HDEL', KEYS[1], '')  -- no record has this key: only whether we may
redis.call('SET', KEYS[2], ARGV[2])
for i = 5, #ARGV, 3 do
  if ARGV[i + 2] ~= '' then redis.call('HSET', KEYS[1], ARGV[i], string.sub(ARGV[i + 2], 2)) end
end
for i = 5, #ARGV, 3 do
  if ARGV[i + 2] == '' then redis.call('HDEL', KEYS[1], ARGV[i]) end
end
redis.call('SET', KEYS[3], 'kept', 'PX', {REMEMBERED_MILLISECONDS})
redis.pcall('PUBLISH', ARGV[3], ARGV[2])
return 'kept'
"""
)

REPORT = Script(
    f"""
-- KEYS: reports, when they end, mark.  ARGV: key, value, for how many ms, most others, the mark
{_CLOCK}
repeat
  local over = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, 500)
  if #over > 0 then
    redis.call('HDEL', KEYS[1], unpack(over))
    redis.call('ZREM', KEYS[2], unpack(over))
  end
until #over < 500
local former = redis.call('HGET', KEYS[1], ARGV[1])
local others = redis.call('ZCARD', KEYS[2])
if redis.call('ZSCORE', KEYS[2], ARGV[1]) then others = others - 1 end
if others >= tonumber(ARGV[4]) then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], now + ARGV[3], ARGV[1])
for i = 1, 2 do  -- when no frontend is left, the reports go too
  if redis.call('PTTL', KEYS[i]) < tonumber(ARGV[3]) then redis.call('PEXPIRE', KEYS[i], ARGV[3]) end
end
if former ~= ARGV[2] then redis.call('SET', KEYS[3], ARGV[5]) end
return 1
"""
)

REPORTS = Script(
    f"""
-- KEYS: reports, when they end.  ARGV: most reports, bytes of a key, of a value, of all
{_CLOCK}
local count = redis.call('ZCOUNT', KEYS[2], '(' .. now, '+inf')
if count > tonumber(ARGV[1]) then return {{-1, count}} end
local found, left_out, bytes = {{0}}, 0, 0
for _, key in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. now, '+inf')) do
  local value = redis.call('HGET', KEYS[1], key)
  if not value or #key > tonumber(ARGV[2]) or #value > tonumber(ARGV[3]) then
    left_out = left_out + 1
  else
    bytes = bytes + #key + #value
    found[#found + 1] = key
    found[#found + 1] = value
  end
end
if bytes > tonumber(ARGV[4]) then return {{-2, bytes}} end
found[1] = left_out
return found
"""
)
