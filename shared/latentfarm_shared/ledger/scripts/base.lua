-- Every transition of the ledger, each atomic and independent of a job's size. The files of this folder are one script.
--
-- An image is known here by its position in the order its job is handed out; Python turns positions into indexes.
-- A job has a part, a range of positions, for every checkpoint it draws on; it is named by the checkpoint's hash and the
-- tags that its workers must have, <hash>[+<tag>...]. A queue is <lane>:<part>.
--
-- lf:job:<id>                hash    spec lock owner lane total cost priority created started state version …
--                                    parts (hashes, comma between), s:<hash> start, c:<hash> cursor and e:<hash> end
--                                    of each part
--                                    gate (positions handed out before a person approves), handed, starts
--                                    marks (how often an image changed its state)
--                                    paused, gated (why nothing is handed out), closed (canceled or expired)
--                                    scan, scan_stop, scan_bytes, scan_zero, k:<hash>: a retry under way
-- lf:job:<id>:states         string  one byte an image: 0 untouched, r running, s succeeded, f failed, c canceled, e expired
-- lf:job:<id>:returned:<h>   zset    images to hand out again, before the cursor moves
-- lf:job:<id>:suspects:<h>   zset    images whose worker died, to be run alone
-- lf:job:<id>:awaiting:<h>   set     images that wait for an identical one that is being rendered
-- lf:job:<id>:errors         hash    position -> JSON of what failed
-- lf:job:<id>:progress       hash    position -> JSON of how far an image in flight is
-- lf:look:<id>               string  somebody looks at a job's images in flight;  lf:seen:<member>  string  what there is to see
-- lf:job:<id>:deaths         hash    position -> what the deaths of workers weigh that held the image alone
-- lf:job:<id>:events         stream  version, what, position (capped)
-- lf:job:<id>:touched        zset    segments of the manifest that changed, by when
-- lf:jobs                    zset    all jobs by their number;  lf:keys  hash  <owner>/<client key> -> job
-- lf:jobs:<owner>            zset    an owner's jobs by their number
-- lf:owners:<queue>          zset    owners with images to hand out, by virtual time
-- lf:ready:<queue>/<owner>   zset    an owner's jobs with images to hand out, by priority, then age
-- lf:suspects:<queue>        zset    jobs with suspects
-- lf:where:<lane>/<owner>    set     queues an owner stands in
-- lf:vt:<lane>               zset    owners' virtual time: pixel-steps handed out over weight;  lf:floor:<lane>  that of the last served
-- lf:served:<queue>          string  when a queue was last served, or began to wait
-- lf:limit:<owner>           hash    weight, running, queued: what an owner may have; lf:limit is everybody else's
-- lf:owner:<owner>           hash    queued, running: what an owner has
-- lf:load                    hash    <lane>: pixel-steps that wait
-- lf:deadlines               zset    jobs by when they expire;  lf:retention  zset  finished jobs by when they are deleted
-- lf:dirty                   zset    jobs whose manifest is behind;  lf:scans  set  jobs with a retry under way
-- lf:have:<owner>:<hhhh>     hash    content ids of an owner's pictures -> <job>/<position>
-- lf:rendering:<owner>       hash    content ids being rendered -> claim;  lf:await:<owner>:<content>  set of images that
--                                    wait for it;  lf:waking  set  <owner>:<content> of which only some were woken yet
-- lf:queues                  set     queues where something was offered;  lf:rung:<queue>  zset  wake-ups under way, by time
-- lf:leases                  zset    claims by the time their lease ends, member <job>/<position>
-- lf:claim:<member>          hash    token worker queue content
-- lf:worker:<name>           hash    what a worker says of itself; :claims is a set of members, :alone those held alone
-- lf:workers                 zset    workers by their last beat;  lf:lone:<member>  the worker that frees itself for a suspect
-- lf:hook:owners, lf:hook:watched: who wants to hear of jobs, and up to which version they have
-- lf:drained                 set     stations told to claim nothing;  lf:aside  hash  stations set aside -> their story
-- lf:rates:<hash>            list    pixel-steps a second that workers measured (capped)
-- lf:names, lf:names:number, lf:names:changes, lf:pins, lf:used: see names.lua

local EVENTS = 1000
local STRIKES, OWN_DEATH, KILLED = 6, 2, 1
local SEGMENT = 1000
local STARVED_MS = 20000
local LOOK_AHEAD = 8   -- images that an owner with a warm checkpoint may be served before one whose checkpoint is not
local OWNERS_SEEN = 512
local WOKEN = 10
local LONE_MS = 5000

local at_once  -- a script's clock stands still
local function now()
  if not at_once then
    local t = redis.call('TIME')
    at_once = t[1] * 1000 + math.floor(t[2] / 1000)
  end
  return at_once
end

local function key_of(job) return 'lf:job:' .. job end

local function get(job, ...) return redis.call('HMGET', key_of(job), ...) end

local function number(value) return tonumber(value or 0) or 0 end

local function event(job, what, position)
  local version = redis.call('HINCRBY', key_of(job), 'version', 1)
  redis.call('XADD', key_of(job) .. ':events', 'MAXLEN', '~', EVENTS, '*',
    'version', version, 'what', what, 'position', position or '')
end

local function count(job, field, by) redis.call('HINCRBY', key_of(job), field, by) end

-- Write an image's byte; if it has a line in the manifest, or had one, its segment is behind.
local function mark(job, position, byte, has_line)
  redis.call('SETRANGE', key_of(job) .. ':states', position, byte)
  redis.call('HINCRBY', key_of(job), 'marks', 1)
  if has_line then
    redis.call('ZADD', key_of(job) .. ':touched', redis.call('INCR', 'lf:touches'), math.floor(position / SEGMENT))
    redis.call('ZADD', 'lf:dirty', 'NX', now(), job)
  end
end

local function split(member)
  local job, position = string.match(member, '^(.*)/(%d+)$')
  return job, tonumber(position)
end

local function queue_name(lane, checkpoint) return lane .. ':' .. checkpoint end

local function checkpoint_of(queue) return (string.match(queue, '^.-:(.*)$')) end

local function lane_of(queue) return (string.match(queue, '^(.-):')) end

local function parts_of(job)
  local parts = {}
  for part in string.gmatch(redis.call('HGET', key_of(job), 'parts') or '', '[^,]+') do parts[#parts + 1] = part end
  return parts
end

-- A worker's name is <station>.<run>; people and drains speak of stations.
local function station_of(worker) return string.match(worker, '^(.*)%.%d+$') or worker end

-- ---- what owners have

local function owner_has(owner, field, by) redis.call('HINCRBY', 'lf:owner:' .. owner, field, by) end

local function limit(owner, field)
  return tonumber(redis.call('HGET', 'lf:limit:' .. owner, field) or redis.call('HGET', 'lf:limit', field))
end

-- Images begin to wait (by > 0) or wait no more.
local function waits(job, by)
  local f = get(job, 'owner', 'lane', 'cost')
  owner_has(f[1], 'queued', by)
  redis.call('HINCRBYFLOAT', 'lf:load', f[2], by * number(f[3]))
end

local function charge(owner, lane, cost)
  local vt = redis.call('ZINCRBY', 'lf:vt:' .. lane, cost / (limit(owner, 'weight') or 1), owner)
  for _, queue in ipairs(redis.call('SMEMBERS', 'lf:where:' .. lane .. '/' .. owner)) do
    redis.call('ZADD', 'lf:owners:' .. queue, 'XX', vt, owner)
  end
end

-- ---- what is offered to workers

local function ready_key(queue, owner) return 'lf:ready:' .. queue .. '/' .. owner end

local function withdraw_from(queue, owner, job)
  redis.call('ZREM', ready_key(queue, owner), job)
  if redis.call('EXISTS', ready_key(queue, owner)) == 0 then
    redis.call('ZREM', 'lf:owners:' .. queue, owner)
    redis.call('SREM', 'lf:where:' .. lane_of(queue) .. '/' .. owner, queue)
  end
end

-- An owner who comes back starts where the others are: waiting earns nothing.
local function join(queue, owner)
  local lane = lane_of(queue)
  local vt = number(redis.call('ZSCORE', 'lf:vt:' .. lane, owner))
  if redis.call('EXISTS', ready_key(queue, owner)) == 0 then
    vt = math.max(vt, number(redis.call('GET', 'lf:floor:' .. lane)))
    redis.call('ZADD', 'lf:vt:' .. lane, vt, owner)
    for _, other in ipairs(redis.call('SMEMBERS', 'lf:where:' .. lane .. '/' .. owner)) do
      redis.call('ZADD', 'lf:owners:' .. other, 'XX', vt, owner)
    end
  end
  if redis.call('EXISTS', 'lf:owners:' .. queue) == 0 then redis.call('SET', 'lf:served:' .. queue, now()) end
  redis.call('ZADD', 'lf:owners:' .. queue, vt, owner)
  redis.call('SADD', 'lf:where:' .. lane .. '/' .. owner, queue)
end

local function is_held(paused, closed) return paused == '1' or (closed or '') ~= '' end

-- Put a job where claims find it, unless it is held back.
local function offer(job, checkpoint)
  local f = get(job, 'owner', 'lane', 'priority', 'number', 'paused', 'gated', 'closed')
  if is_held(f[5], f[7]) then return end
  local queue = queue_name(f[2], checkpoint)
  redis.call('SADD', 'lf:queues', queue)
  local suspects = redis.call('ZRANGE', key_of(job) .. ':suspects:' .. checkpoint, 0, 0, 'WITHSCORES')
  if suspects[1] then redis.call('ZADD', 'lf:suspects:' .. queue, suspects[2], job) end
  local c = get(job, 'c:' .. checkpoint, 'e:' .. checkpoint)
  local goes_on = number(c[1]) < number(c[2]) and f[6] ~= '1'  -- the gate holds back what nobody has seen, not the rest
  if goes_on or redis.call('EXISTS', key_of(job) .. ':returned:' .. checkpoint) == 1 then
    join(queue, f[1])
    redis.call('ZADD', ready_key(queue, f[1]), -number(f[3]) * 2 ^ 36 + number(f[4]), job)
  end
end

local function offer_all(job)
  for _, part in ipairs(parts_of(job)) do offer(job, part) end
end

local function withdraw(job)
  local f = get(job, 'owner', 'lane')
  for _, part in ipairs(parts_of(job)) do
    local queue = queue_name(f[2], part)
    withdraw_from(queue, f[1], job)
    redis.call('ZREM', 'lf:suspects:' .. queue, job)
  end
end

-- ---- a job's state

-- A job holds on to the names it uses, and lets go of them when it needs nothing more.
local function pin(job)
  local f = get(job, 'pins', 'pinned')
  if not f[1] or f[2] == '1' then return end
  redis.call('HSET', key_of(job), 'pinned', '1')
  for _, name in ipairs(cjson.decode(f[1])) do redis.call('HINCRBY', 'lf:pins', name[1], 1) end
end

local function unpin(job)
  local f = get(job, 'pins', 'pinned')
  if not f[1] or f[2] ~= '1' then return end
  redis.call('HSET', key_of(job), 'pinned', '')
  for _, name in ipairs(cjson.decode(f[1])) do
    if redis.call('HINCRBY', 'lf:pins', name[1], -1) <= 0 then redis.call('HDEL', 'lf:pins', name[1]) end
  end
end

local function conclude(job, f)
  unpin(job)
  redis.call('ZREM', 'lf:deadlines', job)
  redis.call('HSET', key_of(job), 'finished', now())
  redis.call('ZADD', 'lf:dirty', 'NX', now(), job)  -- its manifest is to be put together
  if f[12] then redis.call('ZADD', 'lf:retention', now() + f[12], job) end
end

local function state_of(f)
  local total, running, done, failed, canceled, expired =
    number(f[1]), number(f[2]), number(f[3]), number(f[4]), number(f[5]), number(f[6])
  if f[7] ~= '' then
    if done + failed + canceled + expired >= total then
      return canceled > 0 and 'canceled' or expired > 0 and 'expired' or failed > 0 and 'failed' or 'succeeded', true
    end
    return f[7], false
  end
  if not f[8] and done + failed + canceled + expired >= total then
    return canceled > 0 and 'canceled' or expired > 0 and 'expired' or failed > 0 and 'failed' or 'succeeded', true
  end
  if f[9] == '1' or f[10] == '1' then return 'paused', false end
  return (running + done + failed > 0) and 'running' or 'queued', false
end

-- A job's state follows from its counters and from what people asked for.
local function settle(job)
  local f = get(job, 'total', 'running', 'succeeded', 'failed', 'canceled', 'expired', 'closed', 'scan', 'paused', 'gated',
    'state', 'keep_ms')
  local state, final = state_of(f)
  if state ~= f[11] then
    redis.call('HSET', key_of(job), 'state', state)
    event(job, state)
  end
  if final then conclude(job, f) end
end
