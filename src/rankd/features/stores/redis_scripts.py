"""What has to happen in one step inside Redis, as Lua; and the message that tells of an append.

`APPEND` does what `event_records.appended` does, byte for byte. A script is called by its SHA-1; a server that does not
know it yet (NOSCRIPT) is given the text, which it keeps until it restarts.

    message on CHANNEL    key length u16, key, the event records that were added (64 bytes each)
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

CHANNEL = b"rankd:appended"
NOT_A_HISTORY = "RANKD the value is not a history record"
_KEY_LENGTH = struct.Struct("<H")


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script of one key."""

    text: bytes
    digest: bytes

    def by_digest(self, key: bytes, *arguments: bytes | int) -> tuple[bytes | int, ...]:
        """The command that calls it where it is known."""
        return (b"EVALSHA", self.digest, 1, key, *arguments)

    def by_text(self, key: bytes, *arguments: bytes | int) -> tuple[bytes | int, ...]:
        """The command that calls it and makes it known."""
        return (b"EVAL", self.text, 1, key, *arguments)


def _script(text: str) -> Script:
    encoded = text.encode()
    return Script(encoded, hashlib.sha1(encoded, usedforsecurity=False).hexdigest().encode())


# KEYS: history. ARGV: event records, the most to keep, the channel. Returns the header of the record as it is now.
# A few new ids are looked for in the text of the record: next to nothing beside reading it (93 us for 1,000 events on
# Redis 7.0). For many, its ids are put in a table first (285 us), which pays from about 30 new events.
APPEND = _script(
    """
local key, records, most = KEYS[1], ARGV[1], tonumber(ARGV[2])
local old = redis.call('GET', key)
local dropped, ever, newest, count = 0, 0, string.rep('\\0', 8), 0
if old then
  local layout = 0
  count = (#old - 24) / 64
  if count >= 0 and count % 1 == 0 then layout, dropped, ever = struct.unpack('<I4I4I8', old) end
  if layout ~= 1 or ever ~= dropped + count then return redis.error_reply('"""
    + NOT_A_HISTORY
    + """') end
  newest = string.sub(old, 17, 24)
end

local seen, tabled = {}, #records > 30 * 64
if old and tabled then
  for at = 81, #old, 64 do seen[string.sub(old, at, at + 7)] = true end
end
local function is_there(id)
  if seen[id] then return true end
  if tabled or not old then return false end
  local at = string.find(old, id, 25, true)
  while at and at % 64 ~= 17 do at = string.find(old, id, at + 1, true) end
  return at
end

local added = {}
for at = 1, #records, 64 do
  local id = string.sub(records, at + 56, at + 63)
  if not is_there(id) then
    seen[id], newest = true, id
    added[#added + 1] = string.sub(records, at, at + 63)
  end
end
if #added == 0 then return old and string.sub(old, 1, 24) or struct.pack('<I4I4I8', 1, 0, 0) .. newest end

local text = table.concat(added)
local over = math.max(count + #added - most, 0)
local kept
if over < count then kept = string.sub(old, 25 + over * 64) .. text
else kept = string.sub(text, (over - count) * 64 + 1) end
local header = struct.pack('<I4I4I8', 1, dropped + over, ever + #added) .. newest
redis.call('SET', key, header .. kept)
redis.call('PUBLISH', ARGV[3], struct.pack('<I2', #key) .. key .. text)
return header
"""
)

# KEYS: history. ARGV: mark. Returns 0 if the record begins with the mark, or if both are not there; else the record.
HISTORY = _script(
    """
if redis.call('GETRANGE', KEYS[1], 0, 23) == ARGV[1] then return 0 end
return redis.call('GET', KEYS[1])
"""
)

# KEYS: any. ARGV: the value to write, and the value expected, if one is. Returns 1 if it was written, else 0.
EXCHANGE = _script(
    """
if redis.call('GET', KEYS[1]) ~= (ARGV[2] or false) then return 0 end
redis.call('SET', KEYS[1], ARGV[1])
return 1
"""
)


def appended_message(message: bytes) -> tuple[bytes, bytes] | None:
    """The key and the records of a message; None if it is not one of ours."""
    if len(message) < _KEY_LENGTH.size:
        return None
    (length,) = _KEY_LENGTH.unpack_from(message)
    start = _KEY_LENGTH.size + length
    if len(message) < start:
        return None
    return message[_KEY_LENGTH.size : start], message[start:]
