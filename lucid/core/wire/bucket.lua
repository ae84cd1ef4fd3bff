-- The store's side of the hybrid limiter: the same as `lucid/core/rules/bucket.py`, which names the rules,
-- on the store's own clock. KEYS[1] is the marker, KEYS[2] who is here in a roll call, the rest one key per
-- message; ARGV[1] is a `Call`, the answer an `Answer`, both as MessagePack arrays.
--
-- A key is a hash of plain values:
--   m            written first, so that it stands first: [t, s, sum, old, held, live, soonest, exact, ends, room, reset]
--   :{holder}    [seq, size, expires, grant, live]
--   0 to K       what is spent in the slots of these numbers modulo K + 1; what left is 0
-- t last time seen, s slot length, sum of all counted slots, old the first charged one (as its distance from
-- the slot of t), held and live the sum and number of live reservations, soonest (from t) no later than the
-- first of them expires, exact whether it is that, ends (from t) when the key goes away by itself, room how
-- many holders may come before those that are long gone are removed, reset how many slots ago the ring was
-- cleared (-1: not in this window).
-- So a call reads `m`, the caller's own record and the slots that it touches; all holders only when one may
-- have expired. The marker is a text: run, epoch, lost and, during a roll call, its id, beginning and fleet.
--
-- Functions are made anew in each call: the rare ones are made when they are needed. Numbers are spelt with %d,
-- which saves 2 of 31 us a call against %.0f (a C long has 64 bits where Redis runs), and each record is one JSON
-- array, since a value of its own for each number costs more to find and to replace than to parse and to spell.
local call = cmsgpack.unpack(ARGV[1])
local holder, slots, messages, groups = call[4], call[5], call[6], call[7]
local own_field, size = ':' .. holder, slots + 1
local format, decode = string.format, cjson.decode
local redis_call = redis.call
-- So many numbers, or nil.
local function parse(text, count)
  local right, list = pcall(decode, text)
  if right and type(list) == 'table' and #list == count then return list end
end

local HEADER, RECORD = '[%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d]', '[%d,%d,%d,%d,%d]'
local SPARE_SLOTS, LEAST_ROOM = 4, 16

local clock = redis_call('TIME')
local now = clock[1] * 1000 + (clock[2] - clock[2] % 1000) / 1000

-- The marker and the roll call: how many are missing, for how long at most, and the roll call to tell.
local epoch, lost, missing, roll_left, tell = call[2], 0, 0, 0, ''
local marker = redis_call('GET', KEYS[1])
-- A call without a key is a probe: it writes, so that who cannot is not taken for one that answers.
local probes = #messages == 0
if probes or call[9] or epoch == '' or marker ~= call[1] .. ' ' .. epoch .. ' 0' then
  local known, fresh, told, roll_ms = call[2], call[3], call[11], call[12]
  local run, roll, began, fleet = call[1], '', 0, 0
  epoch, lost = fresh, now
  if known == '' then epoch, lost = format('%s@%d', fresh, now), 0 end
  if marker then
    run, epoch, lost, roll, began, fleet = string.match(marker, '^(%S*) (%S*) (%d+) ?(%S*) ?(%d*) ?(%d*)$')
    if not run then
      redis.log(redis.LOG_WARNING, KEYS[1] .. ' was not as the limiter wrote it, and counts as lost')
      run, epoch, lost = call[1], fresh, now
    end
    lost, began, fleet = tonumber(lost), tonumber(began) or 0, tonumber(fleet) or 0
    -- No clock steps back so far.
    if lost > now + 3600000 then lost = now end
    if call[1] ~= '' and run ~= call[1] then
      run, epoch, lost = call[1], fresh, now
    elseif known ~= '' and known ~= epoch and lost == 0 then
      lost = now
    end
  end
  if roll ~= '' and now - began >= roll_ms then roll = '' end
  if call[9] and (roll == '' or roll == told) then
    roll, began, fleet = fresh, now, 0
    redis_call('DEL', KEYS[2])
  end
  if roll ~= '' then
    local reports = call[10] and told == roll
    fleet = math.max(fleet, call[8])
    if reports then
      redis_call('SADD', KEYS[2], holder)
      redis_call('PEXPIRE', KEYS[2], 2 * roll_ms + 60000)
    end
    local here = redis_call('SCARD', KEYS[2])
    if reports and fleet > 0 and here >= fleet then
      roll = ''
    else
      if not reports and redis_call('SISMEMBER', KEYS[2], holder) == 0 then here, tell = here + 1, roll end
      missing, roll_left = fleet > 0 and math.max(0, fleet - here) or 1, began + roll_ms - now
    end
  end
  local judged = format('%s %s %d', run, epoch, lost)
  if roll ~= '' then judged = format('%s %s %d %d', judged, roll, began, fleet) end
  if probes or judged ~= marker then redis_call('SET', KEYS[1], judged) end
end

-- When that was, of an epoch that may have been a first start.
local born = tonumber(string.match(epoch, '@(%d+)$') or 0)

-- What is spent in the slot, as stored or as changed by this call.
local function count_of(bucket, slot)
  local index = slot % size
  local count = bucket.ring[index]
  if not count then
    count = bucket.had and tonumber(redis_call('HGET', bucket.key, index) or 0) or 0
    bucket.ring[index] = count
  end
  return count
end

local function charge(bucket, slot, count)
  if slot > bucket.cur then slot = bucket.cur end
  if count > 0 and slot >= bucket.cur - slots then
    local index, writes = slot % size, bucket.writes
    local at, there = #writes, count_of(bucket, slot) + count
    bucket.ring[index], writes[at + 1], writes[at + 2] = there, index, there
    if bucket.sum == 0 or slot < bucket.old then bucket.old = slot end
    bucket.sum = bucket.sum + count
  end
end

local rare
local function make_rare()
  rare = {}

  -- How many were there to take.
  function rare.take(bucket, slot, count)
    if slot > bucket.cur or slot < bucket.cur - slots then return 0 end
    local index, writes, there = slot % size, bucket.writes, count_of(bucket, slot)
    local at = #writes
    count = math.min(count, there)
    if count > 0 then
      there = there - count
      bucket.ring[index], writes[at + 1], writes[at + 2] = there, index, there
      bucket.sum = bucket.sum - count
      return count
    end
    return 0
  end

  -- From the first charged slots at or after that one.
  function rare.refund(bucket, slot, count)
    local reset = bucket.m[11]
    if slot < bucket.cur - slots or (reset >= 0 and slot <= bucket.cur - reset) then return end
    while count > 0 and slot <= bucket.cur do
      count = count - rare.take(bucket, slot, count)
      slot = slot + 1
    end
  end

  function rare.clear(bucket)
    local fields = {}
    for index = 0, slots do fields[index + 1] = index end
    redis_call('HDEL', bucket.key, unpack(fields))
    bucket.ring, bucket.writes, bucket.sum = {}, { 'HSET', bucket.key, 'm', '' }, 0
  end

  local function read_slots(bucket, from, to)
    local fields = {}
    for slot = from, to do
      if not bucket.ring[slot % size] then fields[#fields + 1] = slot % size end
    end
    if #fields == 0 then return end
    local found = redis_call('HMGET', bucket.key, unpack(fields))
    for at, index in ipairs(fields) do bucket.ring[index] = tonumber(found[at] or 0) or 0 end
  end

  -- Moves `old` on to the first charged slot.
  function rare.seek(bucket)
    while bucket.old < bucket.cur and count_of(bucket, bucket.old) == 0 do
      bucket.old = bucket.old + 1
      if not bucket.ring[bucket.old % size] then
        read_slots(bucket, bucket.old, math.min(bucket.cur, bucket.old + 7))
      end
    end
  end

  -- The charged slot with which more than the excess will have left.
  function rare.outlast(bucket, excess)
    local last, slot = bucket.old, bucket.old
    while slot <= bucket.cur do
      if not bucket.ring[slot % size] then read_slots(bucket, slot, math.min(bucket.cur, slot + 31)) end
      local there = count_of(bucket, slot)
      if there > 0 then last, excess = slot, excess - there end
      if excess < 0 then break end
      slot = slot + 1
    end
    return last
  end

  -- Slots before `first` leave the sum; the same fields are those of slots to come.
  function rare.leave(bucket, first)
    if bucket.old + slots < first then return rare.clear(bucket) end
    read_slots(bucket, bucket.old, first - 1)
    for slot = bucket.old, first - 1 do
      local index, writes = slot % size, bucket.writes
      if bucket.ring[index] > 0 then
        bucket.sum = bucket.sum - bucket.ring[index]
        local at = #writes
        bucket.ring[index], writes[at + 1], writes[at + 2] = 0, index, 0
      end
    end
    bucket.old = first
    if bucket.sum > 0 then rare.seek(bucket) end
  end

  -- Converts a record that expired; nil: nothing of it can come back.
  function rare.judge(bucket, record)
    local slot = (record[3] - record[3] % bucket.slot_ms) / bucket.slot_ms
    if record[5] == 0 then
      if bucket.anew then return nil end
    elseif bucket.now >= record[3] then
      record[5] = 0
      charge(bucket, slot, record[2])
    end
    if record[5] == 1 or (not bucket.resets and record[2] > 0 and slot >= bucket.cur - slots) then return record end
  end

  -- Reads all holders but the caller: what others hold, and when the first of it expires.
  function rare.survey(bucket)
    local all = redis_call('HGETALL', bucket.key)
    local held, live, soonest, gone, kept = 0, 0, 0, {}, 0
    for at = 1, #all, 2 do
      local field = all[at]
      if string.byte(field) == 58 and field ~= own_field then
        local record = parse(all[at + 1], 5)
        local was = record and record[5]
        record = record and rare.judge(bucket, record)
        if not record then
          gone[#gone + 1] = field
        else
          kept = kept + 1
          if record[5] ~= was then
            redis_call('HSET', bucket.key, field, format(RECORD, record[1], record[2], record[3], record[4], 0))
          elseif was == 1 and record[2] > 0 then
            if live == 0 or record[3] < soonest then soonest = record[3] end
            held, live = held + record[2], live + 1
          end
        end
      end
    end
    for from = 1, #gone, 1000 do
      redis_call('HDEL', bucket.key, unpack(gone, from, math.min(#gone, from + 999)))
    end
    bucket.held, bucket.live, bucket.soonest, bucket.exact = held, live, soonest, 1
    bucket.m[10] = math.max(LEAST_ROOM, kept)
  end
  return rare
end

-- `held`, `live` and `soonest` of a bucket are those of the others. No more than 16 fields, where a table of
-- Lua's doubles: making one of 25 took 3 us.
local function load_bucket(key, message)
  local slot_ms = message[3]
  local cur = (now - now % slot_ms) / slot_ms
  local index = cur % size
  local found = redis.pcall('HMGET', key, 'm', own_field, index)
  local had, own = found[1], found[2] and parse(found[2], 5)
  local m = had and parse(had, 11)
  if found.err or (had and not m) or (found[2] and not own) then
    -- Somebody else wrote there. It is forgotten like a key that was deleted, and takes no other along.
    redis.log(redis.LOG_WARNING, key .. ' was not as the limiter wrote it, and begins anew')
    redis_call('DEL', key)
    had, own, m, found = nil, nil, nil, {}
  end
  m = m or { now, slot_ms, 0, 0, 0, 0, 0, 1, -now, LEAST_ROOM, -1 }
  local last, its_ms, live, at = m[1], m[2], m[6], now
  if last > now then at, cur = last, (last - last % slot_ms) / slot_ms end
  local bucket = { key = key, had = had, m = m, slot_ms = slot_ms, now = at, cur = cur, sum = m[3],
    old = (last - last % its_ms) / its_ms - m[4], held = m[5], live = live, soonest = last + m[7], exact = m[8],
    own = own, ring = { [index] = tonumber(found[3] or 0) or 0 }, writes = { 'HSET', key, 'm', '', nil, nil, nil, nil },
    may = false }
  if m[11] >= 0 then
    m[11] = m[11] + cur - (last - last % its_ms) / its_ms
    if m[11] > slots then m[11] = -1 end
  end
  if message[1] == 2 then bucket.resets, m[11] = true, 0 end
  if its_ms ~= slot_ms then
    m[11] = had and 0 or -1
    (rare or make_rare()).clear(bucket)
    bucket.anew = true
    charge(bucket, cur, m[3])
  elseif bucket.sum > 0 and bucket.old < cur - slots then
    (rare or make_rare()).leave(bucket, cur - slots)
  end
  if own then
    if own[5] == 1 and own[2] > 0 then
      bucket.held, bucket.live = bucket.held - own[2], live - 1
      if own[3] == bucket.soonest then bucket.exact = 0 end
    end
    if own[5] == 0 or at >= own[3] then
      bucket.own = (rare or make_rare()).judge(bucket, own)
      if not bucket.own then redis_call('HDEL', key, own_field) end
    end
  end
  if (live > 0 and at >= bucket.soonest) or (m[10] < 1 and not own) or bucket.anew or bucket.resets then
    (rare or make_rare()).survey(bucket)
    if bucket.resets then rare.clear(bucket) end
  end
  return bucket
end

-- Status: 0 done, 1 stale, 2 dropped.
local function settle(bucket, message)
  local seq, keep, journal, record = message[5], message[6], message[11], bucket.own
  if record and seq <= record[1] then return 1 end
  local kept, reported = keep, 0
  local whole = not record or record[1] < message[10]
  if whole and record and record[5] == 1 then charge(bucket, bucket.cur, record[2]) end
  for at = 1, #journal do
    local entry = journal[at]
    local count = entry[3]
    if whole or entry[1] >= record[1] then
      if count < 0 then
        if not whole then (rare or make_rare()).refund(bucket, entry[2], -count) end
      elseif entry[4] == 1 and not whole and record[5] == 0 then
        reported = reported + count
      else
        charge(bucket, entry[2], count)
      end
    end
  end
  if whole then
    kept = 0
  elseif record[5] == 0 then
    local slot = (record[3] - record[3] % bucket.slot_ms) / bucket.slot_ms
    ;(rare or make_rare()).take(bucket, slot, record[2] - reported - keep)
    kept = 0
  end
  if record or #journal > 0 then
    if not record then bucket.m[10] = bucket.m[10] - 1 end
    bucket.own = { seq, kept, bucket.now + message[8], 0, 1 }
  end
  return keep > kept and 2 or 0
end

local buckets, answers = {}, {}
for index = 1, #messages do
  local message = messages[index]
  local bucket = load_bucket(KEYS[index + 2], message)
  local status, held_ms = 0, 0
  if message[1] == 0 then
    status = settle(bucket, message)
    bucket.may = status ~= 1
  end
  local own = bucket.own
  local free = message[2] - bucket.sum - bucket.held - message[13] * missing
  if own and own[5] == 1 then free = free - own[2] end
  if lost > 0 then held_ms = lost + (slots + 2) * message[3] + message[4] - bucket.now end
  if born + message[14] - bucket.now > held_ms then held_ms = born + message[14] - bucket.now end
  if held_ms > 0 then bucket.may, free = false, 0 else held_ms = 0 end
  if free < 0 then free = 0 end
  buckets[index] = bucket
  answers[index] = { status, 0, 0, free, 0, 0, held_ms, bucket.now, 0, 0 }
end

local direct = {}
for at = 1, #groups do
  local count, members = groups[at][1], groups[at][2]
  for each = 1, #members do
    local index = members[each] + 1
    local free = buckets[index].may and answers[index][4] or 0
    if free < count then count = free end
  end
  for each = 1, #members do
    local index = members[each] + 1
    charge(buckets[index], buckets[index].cur, count)
    answers[index][4] = answers[index][4] - count
  end
  direct[at] = count
end

for index = 1, #messages do
  local message, bucket, answer = messages[index], buckets[index], answers[index]
  local op, slot_ms = message[1], message[3]
  local at, own, m = bucket.now, bucket.own, bucket.m
  if answer[1] == 1 then
    if own[5] == 1 and own[1] == message[5] then answer[2], answer[3] = own[4], own[3] - at end
  elseif op == 0 then
    local free = bucket.may and answer[4] or 0
    local life = free * 4 >= message[2] and message[8] or message[9]
    local most = message[7] - (own and own[2] or 0)
    local granted = bucket.live > 0 and free / (bucket.live + 1) or free / 2
    granted = granted - granted % 1
    if granted < message[12] then granted = message[12] end
    if granted > free then granted = free end
    if granted > most then granted = most end
    if granted < 0 then granted = 0 end
    if not own and granted > 0 then
      own = { message[5], 0, 0, 0, 1 }
      m[10] = m[10] - 1
    end
    if own then own[2], own[4], own[3] = own[2] + granted, granted, at + life end
    answer[2], answer[3] = granted, life
    if granted > 0 then answer[4] = free - granted end
  end

  local sum, old = bucket.sum, 0
  if sum > 0 then
    if bucket.ring[bucket.old % size] == 0 then (rare or make_rare()).seek(bucket) end
    old = bucket.cur - bucket.old
  end
  local holds = own and own[5] == 1 and own[2] or 0
  if sum == 0 and bucket.exact == 0 and bucket.live > 0 and (holds == 0 or own[3] > bucket.soonest) then
    (rare or make_rare()).survey(bucket)
  end
  local held, live, soonest, exact = bucket.held, bucket.live, bucket.soonest, bucket.exact
  answer[6] = held + message[13] * missing
  if live == 0 then soonest, exact = at, 1 end
  if holds > 0 then
    if live == 0 or own[3] <= soonest then soonest, exact = own[3], 1 end
    held, live = held + holds, live + 1
  end
  if sum > 0 then
    local leaves, excess = bucket.old, sum + held - message[2]
    if excess > 0 then leaves = (rare or make_rare()).outlast(bucket, excess) end
    answer[5] = (leaves + size) * slot_ms - at
  elseif live > 0 then
    answer[5] = soonest - soonest % slot_ms + size * slot_ms - at
  elseif answer[6] > 0 then
    answer[5] = roll_left
  end
  answer[9], answer[10] = sum, live

  if bucket.had or op == 0 then
    local key, writes, ends = bucket.key, bucket.writes, m[1] + m[9]
    local keeps = (slots + 2) * slot_ms + message[4]
    local late = ends < now + keeps
    if late then
      keeps = keeps + SPARE_SLOTS * slot_ms
      ends = now + keeps
    end
    if own then
      local last = #writes
      writes[last + 1], writes[last + 2] = own_field, format(RECORD, own[1], own[2], own[3], own[4], own[5])
    end
    writes[4] = format(HEADER, at, slot_ms, sum, old, held, live, soonest - at, exact, ends - at, m[10], m[11])
    redis_call(unpack(writes))
    if late then redis_call('PEXPIRE', key, keeps) end
  end
end
return cmsgpack.pack({ epoch, direct, answers, tell })
