-- Jobs: submitted, held back, let go, closed, retried, deleted.

-- submit(job, record, pins): {'new', job}, {'old', job, request} if it was there or its client key is taken, {'taken', job}
-- if somebody else's job has the id, {'gone', name} if a name is no longer to be had, {'full', queued, limit} if the owner
-- has too much waiting.
-- record is JSON: the fields of the job's hash, and parts, [[checkpoint, start, stop]...]; pins is JSON,
-- [[<owner>/<name>, content id]...].
local function submit(_, a)
  local job, record, pins = a[1], cjson.decode(a[2]), cjson.decode(a[3])
  local key = key_of(job)
  local there = get(job, 'owner', 'request')
  if there[1] then return there[1] == record.owner and { 'old', job, there[2] or '' } or { 'taken', job } end
  local named = record.key and record.owner .. '/' .. record.key
  local before = named and redis.call('HGET', 'lf:keys', named)
  if before and redis.call('EXISTS', key_of(before)) == 1 then
    return { 'old', before, get(before, 'request')[1] or '' }
  end
  for _, name in ipairs(pins) do
    local entry = redis.call('HGET', 'lf:names', name[1])
    if not entry or cjson.decode(entry).state ~= 'active' then return { 'gone', name[1] } end
  end
  local total, most = tonumber(record.total), limit(record.owner, 'queued')
  local queued = number(redis.call('HGET', 'lf:owner:' .. record.owner, 'queued'))
  if most and queued + total > most then return { 'full', queued, most } end
  for _, name in ipairs(pins) do redis.call('ZINCRBY', 'lf:used', 1, name[2]) end
  if #pins > 0 then redis.call('HSET', key, 'pins', a[3]) end
  pin(job)
  local hashes = {}
  for i, part in ipairs(record.parts) do
    hashes[i] = part[1]
    redis.call('HSET', key, 's:' .. part[1], part[2], 'c:' .. part[1], part[2], 'e:' .. part[1], part[3])
  end
  record.parts = table.concat(hashes, ',')
  for field, value in pairs(record) do redis.call('HSET', key, field, value) end
  local place = redis.call('INCR', 'lf:sequence')
  redis.call('HSET', key, 'number', place, 'handed', 0, 'starts', 0, 'running', 0, 'succeeded', 0, 'failed', 0,
    'canceled', 0, 'expired', 0, 'version', 0, 'state', 'queued', 'closed', '', 'created', now(),
    'epoch', redis.call('HGET', 'lf:epoch', 'number') or '0')
  redis.call('ZADD', 'lf:jobs', place, job)
  redis.call('ZADD', 'lf:jobs:' .. record.owner, place, job)
  if named then redis.call('HSET', 'lf:keys', named, job) end
  if record.expires_at then redis.call('ZADD', 'lf:deadlines', record.expires_at, job) end
  waits(job, total)
  event(job, 'queued')
  offer_all(job)
  return { 'new', job }
end

-- How many of a job's images wait: never handed out, handed back, suspects, or waiting for identical ones.
local function waiting_of(job)
  local waiting = 0
  for _, part in ipairs(parts_of(job)) do
    local f = get(job, 'c:' .. part, 'e:' .. part)
    waiting = waiting + number(f[2]) - number(f[1])
      + redis.call('ZCARD', key_of(job) .. ':returned:' .. part)
      + redis.call('ZCARD', key_of(job) .. ':suspects:' .. part)
      + redis.call('SCARD', key_of(job) .. ':awaiting:' .. part)
  end
  return waiting
end

local function is_final(job)
  local f = get(job, 'state', 'running')
  return (f[1] == 'succeeded' or f[1] == 'failed' or f[1] == 'canceled' or f[1] == 'expired') and number(f[2]) == 0
end

-- Images that wait are over at once, those in flight as their workers hear of it.
local function close(job, as, reason)
  local closed = redis.call('HGET', key_of(job), 'closed')
  if not closed or closed ~= '' or is_final(job) then return end
  local retried = get(job, 'scan', 'scan_zero')
  if retried[1] and retried[2] ~= '' then as = retried[2] end  -- what is not looked at yet is counted so
  withdraw(job)
  local waiting = waiting_of(job)
  for _, part in ipairs(parts_of(job)) do
    redis.call('DEL', key_of(job) .. ':returned:' .. part, key_of(job) .. ':suspects:' .. part,
      key_of(job) .. ':awaiting:' .. part)
  end
  waits(job, -waiting)
  count(job, as, waiting)
  redis.call('HSET', key_of(job), 'closed', as, 'reason', reason or '')
  redis.call('HDEL', key_of(job), 'scan')
  redis.call('SREM', 'lf:scans', job)
  redis.call('ZREM', 'lf:deadlines', job)
  redis.call('ZADD', 'lf:dirty', 'NX', now(), job)
  redis.call('PUBLISH', 'lf:closed', job)
  settle(job)
end

-- cancel(job): 0 if there is none
local function cancel(_, a)
  if redis.call('EXISTS', key_of(a[1])) == 0 then return 0 end
  close(a[1], 'canceled')
  return 1
end

-- hold(job, field, value): pause ('paused', '1'), resume ('paused', '') or approve ('gated', '')
local function hold(_, a)
  local job, field, value = a[1], a[2], a[3]
  local f = get(job, 'closed', field)
  if not f[1] then return 0 end
  if field == 'gated' then redis.call('HDEL', key_of(job), 'gate') end
  if value == '' then redis.call('HSET', key_of(job), field, '') end
  if (f[2] or '') == value or f[1] ~= '' or is_final(job) then return 1 end
  redis.call('HSET', key_of(job), field, value)
  if value == '1' then withdraw(job) else offer_all(job) end
  settle(job)
  return 1
end

-- prioritise(job, priority)
local function prioritise(_, a)
  if redis.call('EXISTS', key_of(a[1])) == 0 then return 0 end
  redis.call('HSET', key_of(a[1]), 'priority', a[2])
  event(a[1], 'priority ' .. a[2])
  offer_all(a[1])
  return 1
end

-- due(limit): closes jobs whose time is over; returns how many
local function due(_, a)
  local jobs = redis.call('ZRANGEBYSCORE', 'lf:deadlines', '-inf', now(), 'LIMIT', 0, tonumber(a[1]))
  for _, job in ipairs(jobs) do
    redis.call('ZREM', 'lf:deadlines', job)
    close(job, 'expired', 'its time was over')
  end
  return #jobs
end

-- retry(job, missing): begin to hand out again what failed and, if missing is 1, what was canceled or has expired; scan()
-- goes on with it. 0 if there is no such job, 2 if it was closed and has images that only missing would bring back.
local function retry(_, a)
  local job, missing = a[1], a[2] == '1'
  local f = get(job, 'closed', 'scan', 'scan_bytes', 'spec', 'canceled', 'expired', 'scan_zero', 'running', 'owner', 'version')
  if not f[4] then return 0 end
  if f[1] ~= '' and not missing and number(f[5]) + number(f[6]) + number(f[8]) > 0 then return 2 end
  local over = f[1] ~= '' or is_final(job)
  local top, untouched = 0, 0
  for _, part in ipairs(parts_of(job)) do
    local c = get(job, 'c:' .. part, 'e:' .. part)
    top = math.max(top, number(c[1]))
    redis.call('HSET', key_of(job), 'k:' .. part, c[1])
    untouched = untouched + number(c[2]) - number(c[1])
  end
  local zero = f[2] and f[7] or f[1]
  redis.call('HSET', key_of(job), 'scan', 0, 'scan_stop', top, 'scan_bytes', (missing or f[3] == 'fce') and 'fce' or 'f',
    'scan_zero', zero, 'closed', '', 'reason', '')
  if over then
    redis.call('HDEL', key_of(job), 'expires_at', 'max_runtime', 'finished', 'paused')
    redis.call('ZREM', 'lf:deadlines', job)
    pin(job)
  end
  redis.call('SADD', 'lf:scans', job)
  redis.call('ZREM', 'lf:retention', job)
  if f[1] ~= '' then
    count(job, f[1], -untouched)
    waits(job, untouched)
  end
  if redis.call('SISMEMBER', 'lf:hook:owners', f[9]) == 1 then redis.call('HSETNX', 'lf:hook:watched', job, f[10]) end
  event(job, 'retried')
  settle(job)
  offer_all(job)
  return 1
end

local FIELD = { f = 'failed', c = 'canceled', e = 'expired' }

local function waits_already(job, part, position)
  return redis.call('ZSCORE', key_of(job) .. ':returned:' .. part, position)
    or redis.call('ZSCORE', key_of(job) .. ':suspects:' .. part, position)
    or redis.call('SISMEMBER', key_of(job) .. ':awaiting:' .. part, position) == 1
end

-- scan(job, images, states): hand out again at most so many images, looking at so many states at most; 1 while some are left
local function scan(_, a)
  local job = a[1]
  local f = get(job, 'scan', 'scan_stop', 'scan_bytes', 'scan_zero')
  if not f[1] then
    redis.call('SREM', 'lf:scans', job)
    return 0
  end
  local position, stop, again = number(f[1]), number(f[2]), 0
  local to = math.min(position + tonumber(a[3]), stop)
  local states = redis.call('GETRANGE', key_of(job) .. ':states', position, to - 1)
  local from, parts = position, {}
  for _, part in ipairs(parts_of(job)) do
    local k = get(job, 's:' .. part, 'k:' .. part)
    parts[#parts + 1] = { part, number(k[1]), number(k[2]) }
  end
  while position < to and again < tonumber(a[2]) do
    local byte = string.sub(states, position - from + 1, position - from + 1)
    local untouched = byte == '' or byte == '\0'
    local field = untouched and f[4] ~= '' and f[4] or not untouched and string.find(f[3], byte, 1, true) and FIELD[byte]
    for _, part in ipairs(field and parts or {}) do
      if position >= part[2] and position < part[3] and not (untouched and waits_already(job, part[1], position)) then
        count(job, field, -1)
        mark(job, position, '\0', true)
        redis.call('HDEL', key_of(job) .. ':errors', position)
        redis.call('HDEL', key_of(job) .. ':deaths', position)
        redis.call('ZADD', key_of(job) .. ':returned:' .. part[1], position, position)
        again = again + 1
      end
    end
    position = position + 1
  end
  if again > 0 then waits(job, again) end
  local left = position < stop
  if left then
    redis.call('HSET', key_of(job), 'scan', position)
  else
    redis.call('HDEL', key_of(job), 'scan', 'scan_stop', 'scan_bytes', 'scan_zero')
    redis.call('SREM', 'lf:scans', job)
  end
  if again > 0 then offer_all(job) end
  settle(job)
  return left and 1 or 0
end

-- written(job, segment, touch...): the manifest holds these segments as they were when touched last; how many are behind
local function written(_, a)
  local touched = key_of(a[1]) .. ':touched'
  for i = 2, #a, 2 do
    if redis.call('ZSCORE', touched, a[i]) == a[i + 1] then redis.call('ZREM', touched, a[i]) end
  end
  local left = redis.call('ZCARD', touched)
  if left == 0 and not is_final(a[1]) then redis.call('ZREM', 'lf:dirty', a[1]) end
  return left
end

-- clean(job): the manifest of a final job is whole; 0 if something changed meanwhile
local function clean(_, a)
  if redis.call('ZCARD', key_of(a[1]) .. ':touched') > 0 or not is_final(a[1]) then return 0 end
  redis.call('ZREM', 'lf:dirty', a[1])
  return 1
end

-- delete(job): forget a job that is final; its pictures are gone already
local function delete(_, a)
  local job = a[1]
  local f = get(job, 'owner', 'key')
  if not f[1] or not is_final(job) then return 0 end
  if f[2] and redis.call('HGET', 'lf:keys', f[1] .. '/' .. f[2]) == job then
    redis.call('HDEL', 'lf:keys', f[1] .. '/' .. f[2])
  end
  for _, what in ipairs({ '', ':states', ':errors', ':deaths', ':progress', ':events', ':touched' }) do
    redis.call('UNLINK', key_of(job) .. what)
  end
  redis.call('ZREM', 'lf:jobs', job)
  redis.call('ZREM', 'lf:jobs:' .. f[1], job)
  redis.call('ZREM', 'lf:dirty', job)
  redis.call('ZREM', 'lf:retention', job)
  return 1
end
