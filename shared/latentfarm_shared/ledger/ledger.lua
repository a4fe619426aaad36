-- Every transition of the ledger, each atomic and independent of a job's size.
--
-- lf:job:<id>            hash     spec lock total cursor counters state version lane checkpoint created
-- lf:job:<id>:states     string   one byte an image: 0 untouched, r running, s succeeded, f failed, c canceled
-- lf:job:<id>:returned   zset     images to hand out again, before the cursor moves
-- lf:job:<id>:errors     hash     index -> JSON of what failed
-- lf:job:<id>:deaths     hash     index -> how many workers died holding the image alone
-- lf:job:<id>:events     stream   version, what, index (capped)
-- lf:ready:<queue>       zset     jobs with images to hand out, by submission
-- lf:suspects:<queue>    zset     images whose worker died, to be run alone
-- lf:count:<queue>       string   how many images wait in the queue
-- lf:rung:<queue>        zset     wake-ups under way, by time
-- lf:queues              set      queue names ever used
-- lf:leases              zset     claims by the time their lease ends, member <job>/<index>
-- lf:claim:<member>      hash     token worker queue
-- lf:worker:<name>       hash     what a worker says of itself; lf:worker:<name>:claims is a set of members
-- lf:workers             zset     workers by their last beat
-- lf:names               hash     <owner>/<name> -> JSON of the name's record (the truth is in S3)
-- lf:names:number        hash     <owner>/<name> -> number of that record, growing
-- lf:names:changes       stream   names that changed, for workers to follow (capped)
-- lf:pins                hash     <owner>/<name> -> how many unfinished jobs use it
-- lf:used                zset     content ids of embeddings by how many jobs used them
-- A queue is <lane>:<checkpoint hash>.

local EVENTS = 1000
local STRIKES = 3

local function now()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function event(job, what, index)
  local version = redis.call('HINCRBY', 'lf:job:' .. job, 'version', 1)
  redis.call('XADD', 'lf:job:' .. job .. ':events', 'MAXLEN', '~', EVENTS, '*',
    'version', version, 'what', what, 'index', index or '')
end

local function count(job, field, by)
  redis.call('HINCRBY', 'lf:job:' .. job, field, by)
end

local function mark(job, index, byte)
  redis.call('SETRANGE', 'lf:job:' .. job .. ':states', index, byte)
end

-- A job that needs nothing more lets go of the names it holds.
local function unpin(job)
  local pins = redis.call('HGET', 'lf:job:' .. job, 'pins')
  if not pins then return end
  redis.call('HDEL', 'lf:job:' .. job, 'pins')
  for _, pin in ipairs(cjson.decode(pins)) do
    if redis.call('HINCRBY', 'lf:pins', pin[1], -1) <= 0 then redis.call('HDEL', 'lf:pins', pin[1]) end
  end
end

-- A job's state follows from its counters, but for those a person gave it.
local function settle(job)
  local key = 'lf:job:' .. job
  local f = redis.call('HMGET', key, 'total', 'running', 'succeeded', 'failed', 'canceled', 'state')
  local total, running, done, failed, canceled =
    tonumber(f[1]), tonumber(f[2]), tonumber(f[3]), tonumber(f[4]), tonumber(f[5])
  local state = f[6]
  if done + failed + canceled >= total then
    state = canceled > 0 and 'canceled' or failed > 0 and 'failed' or 'succeeded'
    unpin(job)
  elseif state ~= 'canceled' then
    state = (running + done + failed > 0) and 'running' or 'queued'
  end
  if state ~= f[6] then
    redis.call('HSET', key, 'state', state)
    event(job, state)
  end
end

local function queue_of(job)
  local f = redis.call('HMGET', 'lf:job:' .. job, 'lane', 'checkpoint')
  return f[1] .. ':' .. f[2]
end

local function forget(member, worker)
  redis.call('DEL', 'lf:claim:' .. member)
  redis.call('ZREM', 'lf:leases', member)
  redis.call('SREM', 'lf:worker:' .. worker .. ':claims', member)
  redis.call('HDEL', 'lf:worker:' .. worker .. ':alone', member)
end

local function split(member)
  local job, index = string.match(member, '^(.*)/(%d+)$')
  return job, tonumber(index)
end

-- submit(job, spec, lock, total, lane, checkpoint, pins): 1 if new, 0 if it was there, or the name that is gone.
-- pins is JSON, [[<owner>/<name>, content id]...]; a name removed meanwhile is not pinned any more.
local function submit(_, a)
  local job, total, pins = a[1], tonumber(a[4]), cjson.decode(a[7])
  local key = 'lf:job:' .. job
  if redis.call('EXISTS', key) == 1 then return 0 end
  local at = now()
  for _, pin in ipairs(pins) do
    local entry = redis.call('HGET', 'lf:names', pin[1])
    if not entry or cjson.decode(entry).state ~= 'active' then return pin[1] end
  end
  for _, pin in ipairs(pins) do
    redis.call('HINCRBY', 'lf:pins', pin[1], 1)
    redis.call('ZINCRBY', 'lf:used', 1, pin[2])
  end
  if #pins > 0 then redis.call('HSET', key, 'pins', a[7]) end
  redis.call('HSET', key, 'spec', a[2], 'lock', a[3], 'total', total, 'lane', a[5], 'checkpoint', a[6],
    'cursor', 0, 'running', 0, 'succeeded', 0, 'failed', 0, 'canceled', 0, 'expired', 0,
    'version', 0, 'state', 'queued', 'created', at)
  local queue = a[5] .. ':' .. a[6]
  redis.call('ZADD', 'lf:jobs', redis.call('INCR', 'lf:sequence'), job)
  redis.call('ZADD', 'lf:ready:' .. queue, redis.call('GET', 'lf:sequence'), job)
  redis.call('SADD', 'lf:queues', queue)
  redis.call('INCRBY', 'lf:count:' .. queue, total)
  event(job, 'queued')
  return 1
end

local function grant(job, index, worker, queue, lease)
  local member = job .. '/' .. index
  local token = (redis.call('HGET', 'lf:epoch', 'number') or '0') .. '-' .. redis.call('INCR', 'lf:fence')
  redis.call('HSET', 'lf:claim:' .. member, 'token', token, 'worker', worker, 'queue', queue)
  redis.call('ZADD', 'lf:leases', now() + lease, member)
  redis.call('SADD', 'lf:worker:' .. worker .. ':claims', member)
  redis.call('DECR', 'lf:count:' .. queue)
  count(job, 'running', 1)
  mark(job, index, 'r')
  settle(job)
  local f = redis.call('HMGET', 'lf:job:' .. job, 'spec', 'lock')
  return { job, index, token, f[1], f[2] }
end

-- The next image of a job, or nil when none is left to hand out.
local function next_image(job, queue)
  local back = redis.call('ZPOPMIN', 'lf:job:' .. job .. ':returned')
  if back[1] then return tonumber(back[1]) end
  local f = redis.call('HMGET', 'lf:job:' .. job, 'cursor', 'total')
  if tonumber(f[1]) < tonumber(f[2]) then
    return redis.call('HINCRBY', 'lf:job:' .. job, 'cursor', 1) - 1
  end
  redis.call('ZREM', 'lf:ready:' .. queue, job)
  return nil
end

-- claim(worker, lease_ms, queue...): {job, index, token, spec, lock}, or false. Queues stand in order of urgency.
local function claim(_, a)
  local worker, lease = a[1], tonumber(a[2])
  if redis.call('HLEN', 'lf:worker:' .. worker .. ':alone') > 0 then return false end
  for i = 3, #a do
    local queue = a[i]
    local suspect = redis.call('ZRANGE', 'lf:suspects:' .. queue, 0, 0)[1]
    if suspect then
      -- a suspect runs alone, so a busy worker takes nothing more until it is free for it
      if redis.call('SCARD', 'lf:worker:' .. worker .. ':claims') > 0 then return false end
      redis.call('ZREM', 'lf:suspects:' .. queue, suspect)
      redis.call('HSET', 'lf:worker:' .. worker .. ':alone', suspect, 1)
      local job, index = split(suspect)
      return grant(job, index, worker, queue, lease)
    end
    local job = redis.call('ZRANGE', 'lf:ready:' .. queue, 0, 0)[1]
    while job do
      local index = next_image(job, queue)
      if index then return grant(job, index, worker, queue, lease) end
      job = redis.call('ZRANGE', 'lf:ready:' .. queue, 0, 0)[1]
    end
  end
  return false
end

local function holds(member, token)
  return redis.call('HGET', 'lf:claim:' .. member, 'token') == token
end

-- finish(job, index, token, worker, byte, error): 1 if the claim held, 0 if it was lost
local function finish(_, a)
  local job, index, member = a[1], tonumber(a[2]), a[1] .. '/' .. a[2]
  if not holds(member, a[3]) then return 0 end
  forget(member, a[4])
  mark(job, index, a[5])
  count(job, 'running', -1)
  local field = a[5] == 's' and 'succeeded' or a[5] == 'f' and 'failed' or 'canceled'
  count(job, field, 1)
  if a[6] ~= '' then redis.call('HSET', 'lf:job:' .. job .. ':errors', index, a[6]) end
  event(job, 'image ' .. field, index)
  settle(job)
  return 1
end

local function give_back(job, index, queue)
  count(job, 'running', -1)
  if redis.call('HGET', 'lf:job:' .. job, 'state') == 'canceled' then
    mark(job, index, 'c')
    count(job, 'canceled', 1)
    settle(job)
    return false
  end
  mark(job, index, '\0')
  redis.call('INCR', 'lf:count:' .. queue)
  settle(job)
  return true
end

local function hand_back(member, worker)
  local job, index = split(member)
  local queue = redis.call('HGET', 'lf:claim:' .. member, 'queue')
  forget(member, worker)
  if give_back(job, index, queue) then
    redis.call('ZADD', 'lf:job:' .. job .. ':returned', index, index)
    local first = redis.call('ZSCORE', 'lf:jobs', job)
    redis.call('ZADD', 'lf:ready:' .. queue, first, job)
  end
end

-- release(job, index, token, worker): hand an image back without a mark against it
local function release(_, a)
  local member = a[1] .. '/' .. a[2]
  if not holds(member, a[3]) then return 0 end
  hand_back(member, a[4])
  return 1
end

-- disown(worker, member): the worker knows nothing of a claim in its name; hand the image back
local function disown(_, a)
  if redis.call('HGET', 'lf:claim:' .. a[2], 'worker') ~= a[1] then return 0 end
  hand_back(a[2], a[1])
  return 1
end

-- beat(worker, lease_ms, field, value...): extends the worker's leases; members of canceled jobs come back
local function beat(_, a)
  local worker, lease, at = a[1], tonumber(a[2]), now()
  local key = 'lf:worker:' .. worker
  redis.call('HSET', key, 'beat', at, unpack(a, 3))
  redis.call('PEXPIRE', key, 60000)
  redis.call('ZADD', 'lf:workers', at, worker)
  local canceled = {}
  for _, member in ipairs(redis.call('SMEMBERS', key .. ':claims')) do
    redis.call('ZADD', 'lf:leases', 'XX', at + lease, member)
    if redis.call('HGET', 'lf:job:' .. (split(member)), 'state') == 'canceled' then
      canceled[#canceled + 1] = member
    end
  end
  return canceled
end

-- leave(worker): the worker is gone for good
local function leave(_, a)
  redis.call('ZREM', 'lf:workers', a[1])
  redis.call('DEL', 'lf:worker:' .. a[1])
  return 1
end

-- expire(limit): takes back images whose worker died; returns how many
local function expire(_, a)
  local members = redis.call('ZRANGEBYSCORE', 'lf:leases', '-inf', now(), 'LIMIT', 0, tonumber(a[1]))
  for _, member in ipairs(members) do
    local job, index = split(member)
    local f = redis.call('HMGET', 'lf:claim:' .. member, 'worker', 'queue')
    local worker, queue = f[1], f[2]
    local alone = redis.call('HEXISTS', 'lf:worker:' .. worker .. ':alone', member) == 1
    forget(member, worker)
    local deaths = alone and redis.call('HINCRBY', 'lf:job:' .. job .. ':deaths', index, 1) or 0
    if deaths >= STRIKES then
      count(job, 'running', -1)
      count(job, 'failed', 1)
      mark(job, index, 'f')
      redis.call('HSET', 'lf:job:' .. job .. ':errors', index, cjson.encode({
        code = 'QUARANTINED', message = 'workers died ' .. deaths .. ' times rendering this image alone, last ' .. worker }))
      event(job, 'image failed', index)
      settle(job)
    elseif give_back(job, index, queue) then
      redis.call('ZADD', 'lf:suspects:' .. queue, now(), member)
      event(job, 'image returned', index)
    end
  end
  return #members
end

-- cancel(job): images not handed out are canceled at once, those in flight as their workers hear of it
local function cancel(_, a)
  local job = a[1]
  local key = 'lf:job:' .. job
  local f = redis.call('HMGET', key, 'total', 'running', 'succeeded', 'failed', 'canceled', 'state')
  if not f[1] then return 0 end
  if f[6] ~= 'queued' and f[6] ~= 'running' then return 1 end
  local queue = queue_of(job)
  local waiting = f[1] - f[2] - f[3] - f[4] - f[5]
  redis.call('ZREM', 'lf:ready:' .. queue, job)
  redis.call('DEL', key .. ':returned')
  for _, member in ipairs(redis.call('ZRANGE', 'lf:suspects:' .. queue, 0, -1)) do
    if (split(member)) == job then redis.call('ZREM', 'lf:suspects:' .. queue, member) end
  end
  redis.call('DECRBY', 'lf:count:' .. queue, waiting)
  redis.call('HINCRBY', key, 'canceled', waiting)
  redis.call('HSET', key, 'state', 'canceled')
  if tonumber(f[2]) == 0 then unpin(job) end
  event(job, 'canceled')
  return 1
end

-- ring(queue, stale_ms): the wake-ups to send now: min(waiting, free slots) less those under way. Every worker keeps a
-- reserve beside its slots for interactive images.
local function ring(_, a)
  local queue, at = a[1], now()
  local rung = 'lf:rung:' .. queue
  redis.call('ZREMRANGEBYSCORE', rung, '-inf', at - tonumber(a[2]))
  local waiting = tonumber(redis.call('GET', 'lf:count:' .. queue) or '0')
  local lane, checkpoint = string.match(queue, '^(.-):(.*)$')
  local urgent = lane == 'interactive'
  local free = 0
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', 'lf:workers', at - 10000, '+inf')) do
    local f = redis.call('HMGET', 'lf:worker:' .. worker, 'slots', 'checkpoints', 'draining', 'reserve')
    if f[1] and f[2] and string.find(',' .. f[2] .. ',', ',' .. checkpoint .. ',', 1, true) and f[3] ~= '1' then
      local room = f[1] + (urgent and f[4] or 0)
      free = free + math.max(0, room - redis.call('SCARD', 'lf:worker:' .. worker .. ':claims'))
    end
  end
  local tickets = {}
  for _ = 1, math.min(waiting, free) - redis.call('ZCARD', rung) do
    local ticket = redis.call('INCR', 'lf:tickets')
    redis.call('ZADD', rung, at, ticket)
    tickets[#tickets + 1] = tostring(ticket)
  end
  return tickets
end

-- answered(queue, ticket): the wake-up arrived
local function answered(_, a)
  return redis.call('ZREM', 'lf:rung:' .. a[1], a[2])
end

-- epoch(run_id, lease_ms): after the server was away, restarted or not, every lease gets one fresh period
local function epoch(_, a)
  local at, lease = now(), tonumber(a[2])
  local f = redis.call('HMGET', 'lf:epoch', 'run_id', 'swept')
  redis.call('HSET', 'lf:epoch', 'run_id', a[1], 'swept', at)
  redis.call('ZREMRANGEBYSCORE', 'lf:workers', '-inf', at - 60000)
  if f[1] ~= a[1] then
    redis.call('HINCRBY', 'lf:epoch', 'number', 1)
  elseif f[2] and at - f[2] <= lease / 2 then
    return 0
  end
  local fresh = at + lease
  for _, member in ipairs(redis.call('ZRANGE', 'lf:leases', 0, -1)) do
    redis.call('ZADD', 'lf:leases', fresh, member)
  end
  return 1
end

local function change(name, number, entry)
  redis.call('HSET', 'lf:names', name, entry)
  redis.call('HSET', 'lf:names:number', name, number)
  redis.call('XADD', 'lf:names:changes', 'MAXLEN', '~', 10000, '*', 'name', name)
end

-- put_name(name, number, entry, anew): index a name's record unless a later one is there, or the same, if not anew
local function put_name(_, a)
  local number = tonumber(a[2])
  local known = tonumber(redis.call('HGET', 'lf:names:number', a[1]) or '0')
  if number < known or (number == known and a[4] ~= '1') then return 0 end
  change(a[1], number, a[3])
  return 1
end

-- take_name(name, force): mark a name removed, so that nobody pins it from now on; returns how many unfinished jobs
-- pin it, which without force keep it
local function take_name(_, a)
  local entry = redis.call('HGET', 'lf:names', a[1])
  if not entry then return 0 end
  local pins = tonumber(redis.call('HGET', 'lf:pins', a[1]) or '0')
  if pins > 0 and a[2] ~= '1' then return pins end
  local removed = string.gsub(entry, '"state":"%a+"', '"state":"removed"', 1)
  change(a[1], redis.call('HGET', 'lf:names:number', a[1]), removed)
  return 0
end

-- progress(job, index, token, text): what a claimed image says of its own progress; 0 if nobody wants it any more
local function progress(_, a)
  if not holds(a[1] .. '/' .. a[2], a[3]) then return 0 end
  if redis.call('HGET', 'lf:job:' .. a[1], 'state') == 'canceled' then return 0 end
  redis.call('HSET', 'lf:job:' .. a[1], 'progress', a[4])
  return 1
end

local transitions = {
  put_name = put_name, take_name = take_name, progress = progress,
  submit = submit, claim = claim, finish = finish, release = release, disown = disown, beat = beat, leave = leave,
  expire = expire, cancel = cancel, ring = ring, answered = answered, epoch = epoch,
}

return transitions[ARGV[1]](KEYS, { unpack(ARGV, 2) })
