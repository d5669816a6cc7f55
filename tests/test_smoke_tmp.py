async def test_smoke(client):
    r = await client.get("harnesses"); print(r.status_code, r.text[:300])
    r = await client.post("agents", json={"name":"x","system_prompt":"hi","capabilities":["current_time"],"tools":[{"type":"builtin","name":"a","description":"","parameters":{}},{"name":"b","description":"","parameters":{}}]}); print(r.status_code, r.text)
    aid=r.json()["id"]
    r = await client.post("sessions", json={"agent_id": aid,"title":"hello"}); print(r.status_code, r.text)
    sid=r.json()["id"]
    for p in ["agents","agents/x","agents/nope","agents/agent_1","sessions","sessions/"+sid,"capabilities?limit=2","models","providers","orgs","harness-examples","sessions/"+sid+"/export", f"agents/{aid}/export", f"agents/{aid}/stats","sessions/stats","nope"]:
        r = await client.get(p); print(p, r.status_code, r.headers, r.text[:700]); print()
    r = await client.post("agents", json={"name":5,"system_prompt":"hi"}); print(r.status_code, r.text)
    r = await client.post("agents", content=b"{", headers={"content-type":"application/json"}); print(r.status_code, r.text)
    r = await client.post("agents", json={"system_prompt":"hi"}); print(r.status_code, r.text)
    r = await client.post("agents", json={"name":"x","system_prompt":"hi","capabilities":[{"ref":1}]}); print(r.status_code, r.text)
    r = await client.get("agents?offset=-1&limit=x"); print(r.status_code, r.text)
    r = await client.put("agents"); print(r.status_code, r.text)
    r = await client.post("agents"); print(r.status_code, r.text)
    r = await client.get("/api-doc"); print(r.status_code, r.text[:100])
    r = await client.get("/api-doc/openapi.json"); print(r.status_code, r.text[:100])
    import json; json.dump(r.json(), open("/tmp/our_openapi.json","w"), indent=1)
    r = await client.get("/api-doc/static/swagger-ui.css"); print(r.status_code, r.headers)
    r = await client.get("/v1/models"); print(r.status_code, r.headers)
    r = await client.get("/health"); print(r.status_code, r.text)
