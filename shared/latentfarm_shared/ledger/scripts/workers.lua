-- Workers, wake-ups, and the server's own restarts.

-- beat(worker, lease_ms, field, value...): extends the worker's leases; {is_drained, member of a closed job...}
local function beat(_, a)
  local worker, lease, at = a[1], tonumber(a[2]), now()
  local key = 'lf:worker:' .. worker
  redis.call('HSET', key, 'beat', at, unpack(a, 3))
  redis.call('PEXPIRE', key, 60000)
  redis.call('ZADD', 'lf:workers', at, worker)
  local answer = { redis.call('SISMEMBER', 'lf:drained', station_of(worker)) }
  local leases, closed = {}, {}
  for _, member in ipairs(redis.call('SMEMBERS', key .. ':claims')) do
    local job = split(member)
    leases[#leases + 1] = at + lease
    leases[#leases + 1] = member
    if closed[job] == nil then closed[job] = (redis.call('HGET', key_of(job), 'closed') or '') ~= '' end
    if closed[job] then answer[#answer + 1] = member end
  end
  if #leases > 0 then redis.call('ZADD', 'lf:leases', 'XX', unpack(leases)) end
  return answer
end

-- leave(worker): the worker is gone for good
local function leave(_, a)
  redis.call('ZREM', 'lf:workers', a[1])
  redis.call('DEL', 'lf:worker:' .. a[1])
  return 1
end

-- rate(checkpoint, pixel_steps_a_second): what a busy worker measured
local function rate(_, a)
  redis.call('LPUSH', 'lf:rates:' .. a[1], a[2])
  redis.call('LTRIM', 'lf:rates:' .. a[1], 0, 99)
  return 1
end

-- Up to `most` images that a queue has to hand out now.
local function offered(queue, most)
  local found = 0
  for _, owner in ipairs(redis.call('ZRANGE', 'lf:owners:' .. queue, 0, 31)) do
    for _, job in ipairs(redis.call('ZRANGE', ready_key(queue, owner), 0, most - 1)) do
      local part = checkpoint_of(queue)
      local f = get(job, 'c:' .. part, 'e:' .. part)
      found = found + number(f[2]) - number(f[1]) + redis.call('ZCARD', key_of(job) .. ':returned:' .. part)
      if found >= most then return most end
    end
  end
  for _, job in ipairs(redis.call('ZRANGE', 'lf:suspects:' .. queue, 0, 3)) do
    found = found + redis.call('ZCARD', key_of(job) .. ':suspects:' .. checkpoint_of(queue))
  end
  return math.min(found, most)
end

-- ring(queue, stale_ms): the wake-ups to send now: min(waiting, free slots, 64) less those under way. Every worker keeps
-- a reserve beside its slots for interactive images.
local function ring(_, a)
  local queue, at = a[1], now()
  local rung = 'lf:rung:' .. queue
  redis.call('ZREMRANGEBYSCORE', rung, '-inf', at - tonumber(a[2]))
  if redis.call('EXISTS', 'lf:owners:' .. queue) == 0 and redis.call('EXISTS', 'lf:suspects:' .. queue) == 0 then
    redis.call('SREM', 'lf:queues', queue)  -- until something is offered there
    return {}
  end
  local urgent = lane_of(queue) == 'interactive'
  local free = 0
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', 'lf:workers', at - 3000, '+inf')) do
    local f = redis.call('HMGET', 'lf:worker:' .. worker, 'slots', 'queues', 'draining', 'reserve')
    if f[1] and f[2] and string.find(',' .. f[2] .. ',', ',' .. queue .. ',', 1, true) and f[3] ~= '1' then
      local room = number(f[1]) + (urgent and number(f[4]) or 0)
      free = free + math.max(0, room - redis.call('SCARD', 'lf:worker:' .. worker .. ':claims'))
    end
  end
  local wanted = math.min(free, 64) - redis.call('ZCARD', rung)
  if wanted <= 0 then return {} end
  wanted = offered(queue, math.min(free, 64)) - redis.call('ZCARD', rung)
  local tickets = {}
  for _ = 1, wanted do
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

-- epoch(run_id, lease_ms, at_once): notes the server that answers, if its run id is given. After it was away, restarted or not, every lease gets one fresh
-- period. 1 if it is time to sweep, which one process does each second.
local function epoch(_, a)
  local at, lease = now(), tonumber(a[2])
  local f = redis.call('HMGET', 'lf:epoch', 'run_id', 'swept')
  local known = a[1] == '' or f[1] == a[1]
  if known and f[2] and at - f[2] < 800 and a[3] ~= '1' then return 0 end
  redis.call('HSET', 'lf:epoch', 'swept', at)
  if a[1] ~= '' then redis.call('HSET', 'lf:epoch', 'run_id', a[1]) end
  redis.call('ZREMRANGEBYSCORE', 'lf:workers', '-inf', at - 60000)
  if known and f[2] and at - f[2] <= lease / 2 then return 1 end
  if not known then redis.call('HINCRBY', 'lf:epoch', 'number', 1) end
  for _, member in ipairs(redis.call('ZRANGE', 'lf:leases', 0, -1)) do
    redis.call('ZADD', 'lf:leases', at + lease, member)
  end
  return 1
end
