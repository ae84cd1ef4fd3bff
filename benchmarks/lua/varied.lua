-- Each request has a path and a field value of its own, so that whoever remembers whole heads gains nothing.
-- The head is cut once where the two differ: wrk.format per request would cost the generator more than wrk itself.
local first, second, third
local number = 0

local function cut(text, mark)
   local from, to = text:find(mark, 1, true)
   return text:sub(1, from - 1), text:sub(to + 1)
end

function init(args)
   wrk.headers["X-Request-ID"] = "bench-HEADMARK"
   local head = wrk.format("GET", wrk.path .. "/PATHMARK")
   first, head = cut(head, "PATHMARK")
   second, third = cut(head, "HEADMARK")
end

function request()
   number = number + 1
   return first .. number .. second .. number .. third
end
