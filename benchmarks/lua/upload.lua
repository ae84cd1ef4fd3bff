-- POST of 1 MiB; the answer comes when the backend has read all of it.
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/octet-stream"
wrk.body = string.rep("x", 1024 * 1024)
