-- The store's side of the hybrid limiter: the same as `lucid/core/rules/bucket.py`, which names the rules,
-- on the store's own clock. KEYS[1] is the marker, the rest one key per message; ARGV[1] is a `Call`, the
-- answer an `Answer`, both as MessagePack arrays.
--
-- A key is a hash of plain values: `t` last time seen, `s` slot length, `sum` spent in all counted slots,
-- `old` no slot before it is charged, `holders` "id:seq:size:expires:grant:live ..." and one field per
-- charged slot, its number modulo K + 1. Of the ring only slots that left are read (the running sum).
local call = cmsgpack.unpack(ARGV[1])
local run, known, fresh, holder, slots, messages, groups = call[1], call[2], call[3], call[4], call[5], call[6], call[7]
local size = slots + 1
local floor, min, max = math.floor, math.min, math.max
local redis_call = redis.call

local clock = redis_call('TIME')
local now = clock[1] * 1000 + floor(clock[2] / 1000)

local marker = redis_call('HMGET', KEYS[1], 'run', 'epoch', 'lost')
local epoch, lost = marker[2], tonumber(marker[3] or 0)
if not marker[1] then
  epoch, lost = fresh, (known ~= '') and now or 0
  redis_call('HSET', KEYS[1], 'run', run, 'epoch', epoch, 'lost', lost)
elseif run ~= '' and marker[1] ~= run then
  epoch, lost = fresh, now
  redis_call('HSET', KEYS[1], 'run', run, 'epoch', epoch, 'lost', lost)
elseif known ~= '' and known ~= epoch and lost == 0 then
  lost = now
  redis_call('HSET', KEYS[1], 'lost', lost)
end

local function charge(bucket, slot, count)
  slot = min(slot, bucket.cur)
  if count > 0 and slot >= bucket.cur - slots then
    bucket.sum = bucket.sum + count
    bucket.old = min(bucket.old, slot)
    bucket.delta[slot] = (bucket.delta[slot] or 0) + count
  end
end

local function clear(bucket)
  local fields = {}
  for index = 0, slots do fields[#fields + 1] = index end
  redis_call('HDEL', bucket.key, unpack(fields))
  bucket.delta, bucket.sum = {}, 0
end

-- Moves `old` on to the first charged slot at or after `first`; slots before `first` leave the sum.
local function slide(bucket, first)
  local gone = {}
  while bucket.sum > 0 and bucket.old <= bucket.cur do
    local last = min(bucket.cur, max(first - 1, bucket.old + 7), bucket.old + 120)
    local fields = {}
    for slot = bucket.old, last do fields[#fields + 1] = slot % size end
    local found = redis_call('HMGET', bucket.key, unpack(fields))
    for at = 1, #fields do
      local count = tonumber(found[at] or 0)
      if bucket.old < first then
        bucket.sum = bucket.sum - count
        if found[at] then gone[#gone + 1] = fields[at] end
      elseif count + (bucket.delta[bucket.old] or 0) > 0 then
        if #gone > 0 then redis_call('HDEL', bucket.key, unpack(gone)) end
        return
      end
      bucket.old = bucket.old + 1
    end
  end
  if #gone > 0 then redis_call('HDEL', bucket.key, unpack(gone)) end
  bucket.old = max(bucket.old, first)
end

local function load_bucket(key, message)
  local found = redis_call('HMGET', key, 't', 's', 'sum', 'old', 'holders')
  local slot_ms = message[3]
  local bucket = { key = key, holders = {}, delta = {}, had = found[1] }
  bucket.now = max(tonumber(found[1] or 0), now)
  bucket.cur = floor(bucket.now / slot_ms)
  bucket.sum, bucket.old = tonumber(found[3] or 0), tonumber(found[4] or bucket.cur)
  local anew = found[2] and tonumber(found[2]) ~= slot_ms
  if anew then
    local spent = bucket.sum
    clear(bucket)
    bucket.old = bucket.cur
    charge(bucket, bucket.cur, spent)
  end
  local first = bucket.cur - slots
  if bucket.old < first then
    if bucket.old < first - slots then
      clear(bucket)
      bucket.old = bucket.cur
    else
      slide(bucket, first)
    end
  end
  for id, seq, held, expires, grant, live in string.gmatch(found[5] or '', '(%S+):(%d+):(%d+):(%d+):(%d+):(%d)') do
    local record = { tonumber(seq), tonumber(held), tonumber(expires), tonumber(grant), live == '1' }
    local expired = floor(record[3] / slot_ms)
    if anew and not record[5] then record[2] = 0 end
    if record[5] and bucket.now >= record[3] then
      record[5] = false
      charge(bucket, expired, record[2])
    end
    if record[5] or (expired >= first and record[2] > 0) then bucket.holders[id] = record end
  end
  return bucket
end

-- Status (0 done, 1 stale, 2 dropped) and the tokens kept that are still the worker's.
local function settle(bucket, message)
  local seq, keep, journal = message[5], message[6], message[11]
  local record = bucket.holders[holder]
  if record and seq <= record[1] then return 1, 0 end
  local kept = keep
  if not record or record[1] < message[10] then
    if record and record[5] then charge(bucket, bucket.cur, record[2]) end
    for _, entry in ipairs(journal) do charge(bucket, entry[2], entry[3]) end
    kept = 0
  elseif record[5] then
    for _, entry in ipairs(journal) do
      if entry[1] >= record[1] then charge(bucket, entry[2], entry[3]) end
    end
  else
    local reported = 0
    for _, entry in ipairs(journal) do
      if entry[1] >= record[1] then
        if entry[4] == 1 then reported = reported + entry[3] else charge(bucket, entry[2], entry[3]) end
      end
    end
    local slot = floor(record[3] / message[3])
    local there = tonumber(redis_call('HGET', bucket.key, slot % size) or 0) + (bucket.delta[slot] or 0)
    local back = min(record[2] - reported - keep, there)
    if back > 0 then
      bucket.sum = bucket.sum - back
      bucket.delta[slot] = (bucket.delta[slot] or 0) - back
    end
    kept = 0
  end
  if record or #journal > 0 then
    bucket.holders[holder] = { seq, kept, bucket.now + message[8], 0, true }
  end
  return keep > kept and 2 or 0, kept
end

local buckets, statuses, kepts, free, held = {}, {}, {}, {}, {}
for index, message in ipairs(messages) do
  local bucket = load_bucket(KEYS[index + 1], message)
  local status, kept = 0, 0
  if message[1] == 2 then
    clear(bucket)
    bucket.old = bucket.cur
    for id, record in pairs(bucket.holders) do
      if not record[5] then bucket.holders[id] = nil end
    end
  elseif message[1] == 0 then
    status, kept = settle(bucket, message)
  end
  local reserved = 0
  for _, record in pairs(bucket.holders) do
    if record[5] then reserved = reserved + record[2] end
  end
  buckets[index], statuses[index], kepts[index] = bucket, status, kept
  held[index] = lost > 0 and max(0, lost + (slots + 2) * message[3] + message[4] - bucket.now) or 0
  free[index] = max(0, message[2] - bucket.sum - reserved)
end

local direct = {}
for at, group in ipairs(groups) do
  local count = group[1]
  for _, index in ipairs(group[2]) do
    local may = messages[index + 1][1] == 0 and statuses[index + 1] ~= 1 and held[index + 1] == 0
    count = min(count, may and free[index + 1] or 0)
  end
  for _, index in ipairs(group[2]) do
    charge(buckets[index + 1], buckets[index + 1].cur, count)
    free[index + 1] = free[index + 1] - count
  end
  direct[at] = count
end

local answers = {}
for index, message in ipairs(messages) do
  local bucket, status = buckets[index], statuses[index]
  local granted, life = 0, 0
  local record = bucket.holders[holder]
  if status == 1 then
    if record[5] and record[1] == message[5] then granted, life = record[4], record[3] - bucket.now end
  elseif message[1] == 0 then
    local room = held[index] == 0 and free[index] or 0
    local others = 0
    for id, other in pairs(bucket.holders) do
      if other[5] and other[2] > 0 and id ~= holder then others = others + 1 end
    end
    life = room * 4 >= message[2] and message[8] or message[9]
    granted = max(0, min(message[7] - kepts[index], floor(room / 2), floor(room / (others + 1))))
    if not record and granted > 0 then
      record = { message[5], 0, 0, 0, true }
      bucket.holders[holder] = record
    end
    if record then
      record[2], record[4], record[3] = record[2] + granted, granted, bucket.now + life
    end
    free[index] = free[index] - granted
  end

  local elsewhere, live, soonest, packed = 0, 0, nil, {}
  for id, other in pairs(bucket.holders) do
    packed[#packed + 1] = string.format('%s:%d:%d:%.0f:%d:%d', id, other[1], other[2], other[3], other[4],
      other[5] and 1 or 0)
    if other[5] and other[2] > 0 then
      live = live + 1
      soonest = min(soonest or other[3], other[3])
      if id ~= holder then elsewhere = elsewhere + other[2] end
    end
  end
  slide(bucket, bucket.cur - slots)
  local frees = 0
  if bucket.sum > 0 then
    frees = (bucket.old + size) * message[3] - bucket.now
  elseif soonest then
    frees = (floor(soonest / message[3]) + size) * message[3] - bucket.now
  end

  if bucket.had or message[1] == 0 then
    local fields = { 't', string.format('%.0f', bucket.now), 's', message[3], 'sum', bucket.sum,
      'old', string.format('%.0f', bucket.old), 'holders', table.concat(packed, ' ') }
    for slot, change in pairs(bucket.delta) do
      if change > 0 and slot == bucket.cur and not bucket.had then
        fields[#fields + 1] = slot % size
        fields[#fields + 1] = change
      elseif change ~= 0 then
        redis_call('HINCRBY', bucket.key, slot % size, change)
      end
    end
    redis_call('HSET', bucket.key, unpack(fields))
    redis_call('PEXPIRE', bucket.key, (slots + 2) * message[3] + message[4])
  end
  answers[index] = { status, granted, life, held[index] > 0 and 0 or free[index], frees, elsewhere, held[index],
    bucket.now, bucket.sum, live }
end
return cmsgpack.pack({ epoch, direct, answers })
