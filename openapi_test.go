// These tests compare openapi.yaml and the server in both directions: each route, parameter, field, header and status
// of one is in the other.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// A spec is openapi.yaml, and what responses had of it.
type spec struct {
	t    *testing.T
	root map[string]any
	mux  *http.ServeMux // finds the operation of a path
	seen map[string]bool
}

func readSpec(t *testing.T) *spec {
	t.Helper()
	text, err := os.ReadFile("openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	root, err := readYAML(string(text))
	if err != nil {
		t.Fatal(err)
	}
	s := &spec{t: t, root: root.(map[string]any), mux: http.NewServeMux(), seen: map[string]bool{}}
	for _, name := range s.operations() {
		s.mux.HandleFunc(name, http.NotFound)
	}
	return s
}

// operations lists the operations as "GET /manage/projects".
func (s *spec) operations() (names []string) {
	for path, item := range s.root["paths"].(map[string]any) {
		for method := range item.(map[string]any) {
			names = append(names, strings.ToUpper(method)+" "+path)
		}
	}
	slices.Sort(names)
	return names
}

func (s *spec) operation(name string) map[string]any {
	method, path, _ := strings.Cut(name, " ")
	return s.root["paths"].(map[string]any)[path].(map[string]any)[strings.ToLower(method)].(map[string]any)
}

// at follows names down a map and resolves references on the way. It returns nil if there is nothing.
func (s *spec) at(v any, path ...string) map[string]any {
	m, _ := v.(map[string]any)
	for {
		ref, ok := m["$ref"].(string)
		if !ok {
			break
		}
		rest, ok := strings.CutPrefix(ref, "#/")
		if !ok {
			s.t.Fatalf("unknown reference %s", ref)
		}
		if m = s.at(s.root, strings.Split(rest, "/")...); m == nil {
			s.t.Fatalf("there is nothing at %s", ref)
		}
	}
	if len(path) == 0 || m == nil {
		return m
	}
	return s.at(m[path[0]], path[1:]...)
}

// properties returns the properties of a schema, with those of its allOf.
func (s *spec) properties(schema map[string]any) map[string]any {
	out := maps.Clone(s.at(schema, "properties"))
	if out == nil {
		out = map[string]any{}
	}
	parts, _ := schema["allOf"].([]any)
	for _, p := range parts {
		maps.Copy(out, s.properties(s.at(p)))
	}
	return out
}

// required returns the names of the required properties of a schema.
func (s *spec) required(schema map[string]any) (out []string) {
	list, _ := schema["required"].([]any)
	for _, v := range list {
		out = append(out, v.(string))
	}
	parts, _ := schema["allOf"].([]any)
	for _, p := range parts {
		out = append(out, s.required(s.at(p))...)
	}
	return out
}

// types returns the JSON types that a schema allows.
func (s *spec) types(schema map[string]any) (out []string) {
	switch v := schema["type"].(type) {
	case string:
		out = append(out, v)
	case []any:
		for _, t := range v {
			out = append(out, fmt.Sprint(t))
		}
	}
	parts, _ := schema["oneOf"].([]any)
	for _, p := range parts {
		out = append(out, s.types(s.at(p))...)
	}
	if schema["allOf"] != nil {
		out = append(out, "object")
	}
	return out
}

// parameters returns the parameters of an operation that are in the path or in the query, by name.
func (s *spec) parameters(op map[string]any, in string) map[string]map[string]any {
	out := map[string]map[string]any{}
	list, _ := op["parameters"].([]any)
	for _, p := range list {
		if m := s.at(p); m["in"] == in {
			out[m["name"].(string)] = m
		}
	}
	return out
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// TestOpenAPIRoutes: the URLs, their roles and their path parameters are the same.
func TestOpenAPIRoutes(t *testing.T) {
	t.Parallel()
	s := readSpec(t)
	want := []string{"GET /healthz", "GET /metrics", "GET /openapi.yaml", "GET /readyz"}
	for _, rt := range (&manageAPI{ops: &operations{}}).manageTable() {
		want = append(want, rt.pattern)
		if !slices.Contains(s.operations(), rt.pattern) {
			continue // reported below
		}
		if got := s.operation(rt.pattern)["x-role"]; got != string(rt.minRole) {
			t.Errorf("%s: x-role is %v, the server requires %s", rt.pattern, got, rt.minRole)
		}
	}
	slices.Sort(want)
	if got := s.operations(); !slices.Equal(got, want) {
		t.Errorf("openapi.yaml has\n%s\nthe server\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	ids := map[any]bool{}
	for _, name := range s.operations() {
		op := s.operation(name)
		var inPath []string
		for _, m := range regexp.MustCompile(`{(\w+)}`).FindAllStringSubmatch(name, -1) {
			inPath = append(inPath, m[1])
		}
		slices.Sort(inPath)
		if got := sortedKeys(s.parameters(op, "path")); !slices.Equal(got, inPath) {
			t.Errorf("%s: path parameters %v", name, got)
		}
		if id := op["operationId"]; id == nil || ids[id] {
			t.Errorf("%s: operationId %v is missing or not unique", name, id)
		}
		ids[op["operationId"]] = true
	}
}

// TestOpenAPIFields: each declared field of an input is a property of its schemas, and each property is
// declared. Null is allowed in both or in neither.
func TestOpenAPIFields(t *testing.T) {
	t.Parallel()
	s := readSpec(t)
	tables := newFieldTables()
	compareFields(s, tables.token, "TokenCreate", "TokenPatch")
	compareFields(s, tables.rotate, "", "TokenRotate")
	compareFields(s, tables.project, "ProjectCreate", "ProjectPatch")
	compareFields(s, tables.upstream, "UpstreamCreate", "UpstreamPatch")
	compareFields(s, tables.key, "KeyCreate", "KeyPatch")
	compareFields(s, tables.price, "PriceSet", "")
	compareFields(s, tables.webhook, "WebhookCreate", "WebhookPatch")
}

// compareFields compares a table of fields with the schemas of a new object and of a change; "" for none.
func compareFields[I, R any](s *spec, fields []field[I, R], create, patch string) {
	s.t.Helper()
	for _, schema := range []string{create, patch} {
		if schema == "" {
			continue
		}
		properties := s.properties(s.at(s.root, "components", "schemas", schema))
		for _, f := range fields {
			if f.createOnly && schema == patch {
				continue
			}
			if properties[f.name] == nil {
				s.t.Errorf("%s: openapi.yaml does not have %s", schema, f.name)
				continue
			}
			documented := slices.Contains(s.types(s.at(properties[f.name])), "null")
			if declared := f.nullable || f.resettable && schema == patch; declared != documented {
				s.t.Errorf("%s.%s: null is declared as allowed: %v; in openapi.yaml: %v", schema, f.name, declared,
					documented)
			}
			delete(properties, f.name)
		}
		for name := range properties {
			s.t.Errorf("%s: manage_fields.go does not declare %s", schema, name)
		}
	}
}

// operationPath puts the IDs of the test's objects into a pattern. It has no calls, prices and keys.
func (p *testProxy) operationPath(name string) (method, path string) {
	method, path, _ = strings.Cut(name, " ")
	id := "none"
	switch {
	case strings.HasPrefix(path, "/manage/projects/"):
		id = p.project
	case strings.HasPrefix(path, "/manage/tokens/"):
		id = p.tokenID
	}
	return method, strings.NewReplacer("{id}", id, "{upstream}", p.upstream, "{delivery}", "none").Replace(path)
}

// knownNames returns the names that the refusal of an unknown one lists.
func knownNames(t *testing.T, res testResponse) []string {
	t.Helper()
	_, list, ok := strings.Cut(res.message(), "known are: ")
	if res.status != 400 || !ok {
		t.Fatalf("got %d %s", res.status, res.body)
	}
	names := strings.Split(strings.TrimSuffix(list, "."), ", ")
	if slices.Equal(names, []string{"none"}) {
		names = nil
	}
	slices.Sort(names)
	return names
}

// errorDetail returns the message and parameter of an error.
func (a testResponse) errorDetail() (message, param string) {
	var e struct {
		Error struct{ Message, Param string }
	}
	_ = json.Unmarshal([]byte(a.body), &e)
	return e.Error.Message, e.Error.Param
}

func (a testResponse) message() string { m, _ := a.errorDetail(); return m }

func (a testResponse) param() string { _, p := a.errorDetail(); return p }

// TestOpenAPIRequests: the fields and query parameters are the same, and have the same types.
func TestOpenAPIRequests(t *testing.T) {
	t.Parallel()
	s, p := readSpec(t), newTest(t, nil)
	for _, name := range s.operations() {
		method, path := p.operationPath(name)
		if !strings.HasPrefix(path, "/manage/") {
			continue
		}
		op := s.operation(name)
		query := s.parameters(op, "query")
		got, want := knownNames(t, p.manageAs(p.adminKey, method, path+"?no_such=1", "")), sortedKeys(query)
		if !slices.Equal(got, want) {
			t.Errorf("%s has the parameters %v; openapi.yaml has %v", name, got, want)
		}
		for q, param := range query {
			schema := s.at(param, "schema")
			if schema["enum"] == nil && schema["type"] == "string" && schema["format"] == nil && q != "after" {
				continue // any text is allowed
			}
			if q == "provider" {
				continue // an unknown provider has no price
			}
			res := p.manageAs(p.adminKey, method, path+"?"+q+"=no%20such", "")
			if res.status != 400 || res.param() != q {
				t.Errorf("%s?%s=no such: got %d %s", name, q, res.status, res.body)
			}
		}
		if method != "POST" && method != "PATCH" {
			if op["requestBody"] != nil {
				t.Errorf("%s has no body", name)
			}
			continue
		}
		schema := s.at(op, "requestBody", "content", "application/json", "schema")
		got, want = knownNames(t, p.manageAs(p.adminKey, method, path, `{"no_such":1}`)),
			sortedKeys(s.properties(schema))
		if !slices.Equal(got, want) {
			t.Errorf("%s has the fields %v; openapi.yaml has %v", name, got, want)
		}
		for field, v := range s.properties(schema) {
			s.tryField(p, method, path, field, s.at(v), requiredFields(p)[name])
		}
	}
}

// tryField sends a field with values of all types, together with the required fields, and expects the types that
// its schema does not allow to be refused with its name.
func (s *spec) tryField(p *testProxy, method, path, field string, schema map[string]any, base map[string]string) {
	s.t.Helper()
	types := s.types(schema)
	for kind, value := range map[string]string{
		"null": "null", "boolean": "true", "integer": "7", "string": `"x"`, "array": `[{}]`,
		"object": `{"x":1}`, "number": "1.5",
	} {
		if slices.Contains(types, kind) || kind == "integer" && slices.Contains(types, "number") {
			continue
		}
		body := maps.Clone(base)
		if body == nil {
			body = map[string]string{}
		}
		body[field] = value
		if res := p.manageAs(p.adminKey, method, path, jsonObject(body)); res.status != 400 || res.param() != field {
			s.t.Errorf("%s %s with %s %s: got %d %s", method, path, field, value, res.status, res.body)
		}
	}
}

// requiredFields returns the required fields of each operation, with values.
func requiredFields(p *testProxy) map[string]map[string]string {
	return map[string]map[string]string{
		"POST /manage/projects":                {"name": `"a"`},
		"POST /manage/projects/{id}/upstreams": {"name": `"a"`, "api_key": `"sk-0123456789abcdef"`},
		"POST /manage/tokens":                  {"project_id": `"` + p.project + `"`},
		"POST /manage/prices":                  {"match": `"m"`},
		"POST /manage/keys":                    {"name": `"a"`, "role": `"viewer"`},
		"POST /manage/webhooks":                {"name": `"a"`, "format": `"slack"`, "url": `"` + deadURL + `"`},
	}
}

// TestOpenAPIRequired: a request without a field that its schema requires is refused, and one with just these
// fields is not.
func TestOpenAPIRequired(t *testing.T) {
	t.Parallel()
	s, p := readSpec(t), newTest(t, nil)
	for name, body := range requiredFields(p) {
		required := s.required(s.at(s.operation(name), "requestBody", "content", "application/json", "schema"))
		slices.Sort(required)
		if !slices.Equal(required, sortedKeys(body)) {
			t.Errorf("%s requires %v in openapi.yaml, and %v in the test", name, required, sortedKeys(body))
		}
		method, path := p.operationPath(name)
		for _, omitted := range required {
			part := maps.Clone(body)
			delete(part, omitted)
			res := p.manageAs(p.adminKey, method, path, jsonObject(part))
			if res.status != 400 || res.param() != omitted {
				t.Errorf("%s without %s: got %d %s", name, omitted, res.status, res.body)
			}
		}
		if name == "POST /manage/prices" {
			body["input"] = "1" // or output; the schema does not express this
		}
		p.manage(method, path, jsonObject(body), 201, nil)
	}
}

func jsonObject(members map[string]string) string {
	var parts []string
	for _, name := range sortedKeys(members) {
		parts = append(parts, `"`+name+`":`+members[name])
	}
	return "{" + strings.Join(parts, ",") + "}"
}

// checkResponse compares a response with those of its operation.
func (s *spec) checkResponse(method, path string, res testResponse) {
	s.t.Helper()
	u, err := url.Parse(path)
	if err != nil {
		s.t.Fatal(err)
	}
	_, name := s.mux.Handler(&http.Request{Method: method, URL: u, Host: "x"})
	if name == "" {
		s.t.Fatalf("no operation for %s %s", method, path)
	}
	declared := s.at(s.operation(name), "responses", fmt.Sprint(res.status))
	if declared == nil {
		s.t.Errorf("%s: the status %d is not in openapi.yaml: %s", name, res.status, res.body)
		return
	}
	for _, h := range []string{"ETag", "X-Request-ID", "Retry-After", "WWW-Authenticate", "Allow"} {
		schema := s.at(declared, "headers", h)
		if got := res.header.Get(h); (got != "") != (schema != nil) {
			s.t.Errorf("%s %d: header %s is %q, in openapi.yaml %v", name, res.status, h, got, schema)
		}
	}
	where := fmt.Sprintf("%s %d ", name, res.status)
	kind, _, _ := strings.Cut(res.header.Get("Content-Type"), ";")
	schema := s.at(declared, "content", kind, "schema")
	if schema == nil {
		s.t.Errorf("%sis %s, in openapi.yaml it is not", where, kind)
		return
	}
	var v any = res.body
	if kind == "application/json" {
		if err := json.Unmarshal([]byte(res.body), &v); err != nil {
			s.t.Errorf("%s%v", where, err)
		}
	}
	s.seen[where] = true
	s.validate(where, schema, v)
}

// validate compares a value with a schema, and records each property that it sees.
func (s *spec) validate(where string, schema map[string]any, v any) {
	s.t.Helper()
	types := s.types(schema)
	kind := jsonType(v)
	if len(types) > 0 && !slices.Contains(types, kind) && !(kind == "integer" && slices.Contains(types, "number")) {
		s.t.Errorf("%s: is %v, not of %v", where, v, types)
		return
	}
	if enum, ok := schema["enum"].([]any); ok && !slices.Contains(enum, v) || schema["const"] != nil &&
		schema["const"] != v {
		s.t.Errorf("%s: %v is not one of %v%v", where, v, enum, schema["const"])
	}
	if text, ok := v.(string); ok && schema["format"] == "date-time" {
		if _, err := time.Parse(time.RFC3339, text); err != nil {
			s.t.Errorf("%s: %v", where, err)
		}
	}
	switch v := v.(type) {
	case []any:
		for _, item := range v {
			s.validate(where+"[]", s.at(schema, "items"), item)
		}
	case map[string]any:
		properties := s.properties(schema)
		for _, name := range s.required(schema) {
			if _, ok := v[name]; !ok {
				s.t.Errorf("%s: %s is missing", where, name)
			}
		}
		for name, value := range v {
			if extra, ok := schema["additionalProperties"].(map[string]any); ok && properties[name] == nil {
				s.validate(where+"{}", extra, value)
				continue
			}
			if properties[name] == nil && fmt.Sprint(schema["additionalProperties"]) == "true" {
				continue
			}
			if properties[name] == nil {
				s.t.Errorf("%s: %s is not in openapi.yaml", where, name)
				continue
			}
			s.seen[where+"."+name] = true
			s.validate(where+"."+name, s.at(properties[name]), value)
		}
	}
}

func jsonType(v any) string {
	switch v := v.(type) {
	case nil:
		return "null"
	case bool:
		return "boolean"
	case string:
		return "string"
	case []any:
		return "array"
	case float64:
		if v == float64(int64(v)) {
			return "integer"
		}
		return "number"
	}
	return "object"
}

// reportUnseen reports the properties of a schema that no response had.
func (s *spec) reportUnseen(where string, schema map[string]any) {
	s.t.Helper()
	if items := s.at(schema, "items"); items != nil {
		s.reportUnseen(where+"[]", items)
	}
	for name, v := range s.properties(schema) {
		if !s.seen[where+"."+name] {
			s.t.Errorf("%s: no response has %s", where, name)
			continue
		}
		s.reportUnseen(where+"."+name, s.at(v))
	}
}

// A responseTest calls every operation and compares the responses with openapi.yaml.
type responseTest struct {
	*spec
	*testProxy
}

// call makes a call with the admin's key, and returns the first ID of its response.
func (c responseTest) call(method, path, body string, status int) string {
	c.testProxy.t.Helper()
	res := c.manageAs(c.adminKey, method, path, body)
	if res.status != status {
		c.testProxy.t.Fatalf("%s %s: got %d, want %d: %s", method, path, res.status, status, res.body)
	}
	c.checkResponse(method, path, res)
	return between(res.body, `"id":"`, `"`)
}

// TestOpenAPIResponses: each field of each response is in its schema, and each property of a schema is in a response.
func TestOpenAPIResponses(t *testing.T) {
	t.Parallel()
	c := responseTest{readSpec(t), newTest(t, nil)}
	const policy = `"endpoints":["/v1/*"],"models":["gpt-4o*"],"addresses":["0.0.0.0/0","::/0"],` +
		`"limits":[{"count":"requests","max":1000,"per":"day","endpoint":"/v1/*","model":"gpt*","shadow":true},` +
		`{"count":"requests","max":1000,"per":"day","for_each":"end_user","max_values":9}]`
	project := c.call("POST", "/manage/projects", `{"name":"second","openai_api_key":"`+c.provider.key+
		`","policy":{`+policy+`,"stateful":true,"keep_content_days":3,"cache":{"ttl_seconds":60,`+
		`"scope":"token","endpoints":["/v1/*"],"when":"always","max_entry_bytes":4096},"attribution":{`+
		`"tags":["team"],"required":["tag:team"],"end_users":"hashed"}},"routing":{`+
		`"fallbacks":[{"model":"a","to":"b"}],"aliases":{"fast":"a","smart":["b","c"]},"verified_streams":true,`+
		`"show_upstream":true,"affinity":"session"}}`, 201)
	c.call("GET", "/manage/projects?limit=1&name=second", "", 200)
	c.call("GET", "/manage/projects?limit=1", "", 200)
	path := "/manage/projects/" + project
	c.call("GET", path, "", 200)
	c.call("PATCH", path, `{"is_active":true}`, 200)
	c.call("GET", path+"/route?model=a&api=openai", "", 200)
	upstream := path + "/upstreams/" +
		c.call("POST", path+"/upstreams", `{"name":"u","api_key":"`+c.provider.key+`","models":["m*"]}`, 201)
	c.call("GET", path+"/upstreams", "", 200)
	c.call("GET", upstream, "", 200)
	c.call("PATCH", upstream, `{"weight":2}`, 200)
	c.call("POST", upstream+"/test", ``, 200)
	token := "/manage/tokens/" +
		c.call("POST", "/manage/tokens", `{"project_id":"`+project+`","policy":{`+policy+
			`,"attribution":{"required":["session"],"fixed_tags":{"team":"search"}}}}`, 201)
	c.call("GET", token, "", 200)
	c.call("PATCH", token, `{"max_requests":5,"idle_expiry_minutes":5,"expires_at":null}`, 200)
	c.call("POST", token+"/rotate", ``, 200)
	c.call("GET", "/manage/tokens?limit=1&project_id="+project, "", 200)
	c.call("GET", "/manage/tokens?limit=1", "", 200)
	for _, path := range []string{"/manage/projects/" + c.project, "/manage/tokens/" + c.tokenID} {
		c.manage("PATCH", path,
			`{"policy":{"limits":[{"count":"tokens","max":1000,"per":"day","for_each":"session"}]}}`, 200, nil)
		c.chat(tinyBody)
		c.call("GET", path+"?limit_values=5", "", 200)
		c.manage("PATCH", path, `{"policy":{}}`, 200, nil)
	}
	c.checkCallResponses()
	c.checkPriceAndKeyResponses()
	c.call("DELETE", token, "", 200)
	c.call("POST", path+"/tokens/revoke", "", 200)
	c.call("DELETE", upstream, "", 200)
	c.call("DELETE", path+"/content", "", 200)
	c.call("DELETE", path+"/end-users?end_user=a%2Fb", "", 200)
	c.call("DELETE", path+"/cache", "", 200)
	c.call("DELETE", path, "", 200)
	for _, path := range []string{"/healthz", "/readyz", "/openapi.yaml"} {
		c.checkResponse("GET", path, c.do("GET", path, ""))
	}
	c.checkResponse("GET", "/metrics", c.manageAs(c.adminKey, "GET", "/metrics", ""))
	c.reportUnseenResponses()
}

// checkCallResponses makes calls to the provider, and calls what shows them.
func (c responseTest) checkCallResponses() {
	c.manage("PATCH", "/manage/projects/"+c.project,
		`{"policy":{"keep_content_days":3},"cost_multiplier":0.8}`, 200, nil)
	c.allowSecret(promptCanary)
	c.enableCache(`"when":"always"`)
	c.chat()
	c.cacheSettled()
	c.call("GET", "/manage/projects/"+c.project+"/cache", "", 200)
	c.manage("PATCH", "/manage/projects/"+c.project, `{"policy":{"keep_content_days":3,`+
		`"attribution":{"tags":["team"]}},"routing":{"aliases":{"gpt-4o-mini":["gpt-4o-mini"]}}}`, 200, nil)
	c.chat()
	c.chat(`"stream":true`)
	headers := append(c.jsonHeaders(), tagsHeader, "team=c")
	c.do("POST", chatPattern, chatBody(`"user":"a","prompt_cache_key":"b"`), headers...)
	c.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		return c.reply(200, strings.ReplaceAll(chatResponseBody, "gpt-4o-mini-2024-07-18", "in-no-list"))
	})
	c.do("POST", chatPattern, strings.Replace(chatBody(), "gpt-4o-mini", "in-no-list", 1), c.jsonHeaders()...)
	c.waitSettled()
	c.call("GET", "/manage/prices/unpriced", "", 200)
	second, _ := c.addUpstream(`"priority":1`)
	c.provider.setScript(func(c *providerConn, _ recordedRequest) bool { return c.reply(429, "{}") })
	c.chat(`"prompt_cache_key":"b"`) // with two attempts
	c.waitSettled()
	request := "/manage/requests/" + c.call("GET", "/manage/requests?limit=1", "", 200)
	second.setScript(endlessScript)
	for range 2 {
		if _, err := c.stream(c.token).read(1); err != nil {
			c.testProxy.t.Fatal(err)
		}
	}
	c.call("GET", "/manage/streams?limit=1", "", 200)
	c.call("GET", "/manage/replicas", "", 200)
	c.call("DELETE", "/manage/streams/"+c.call("GET", "/manage/streams", "", 200), "", 200)
	c.call("GET", request, "", 200)
	c.call("GET", request+"/content", "", 200)
	c.call("GET", "/manage/usage?group_by=project,token,model,endpoint,outcome,service_tier", "", 200)
	c.call("GET", "/manage/usage?group_by=cache", "", 200)
	for _, attribute := range []string{"session", "end_user", "tag:team"} {
		c.call("GET", "/manage/usage?group_by="+attribute, "", 200)
	}
	c.call("GET", "/manage/sessions?session=b&limit=1", "", 200)
	c.call("GET", "/manage/sessions?session=b", "", 200)
	c.call("GET", "/manage/usage?interval=total", "", 200)
}

func (c responseTest) checkPriceAndKeyResponses() {
	price := c.call("POST", "/manage/prices", `{"match":"m","input":1,"cached_input":"0.5","cache_write":2,`+
		`"output":3,"audio_input":4,"audio_output":5.25}`, 201)
	c.call("GET", "/manage/prices", "", 200)
	c.call("GET", "/manage/prices?model=gpt-4o&provider=openai", "", 200)
	c.call("GET", "/manage/prices/list?search=gpt-4o&provider=openai&limit=2", "", 200)
	c.call("POST", "/manage/prices/simulate", `{"model":"gpt-4o","counts":{"input_tokens":9,`+
		`"cost_multiplier_ten_thousandths":8000}}`, 200)
	from := time.Now().UTC().Truncate(24 * time.Hour).Format(time.RFC3339)
	to := time.Now().UTC().Add(48 * time.Hour).Format(time.RFC3339)
	c.call("POST", "/manage/prices/simulate", `{"model":"gpt-4o","from":"`+from+`","to":"`+to+`"}`, 200)
	c.call("DELETE", "/manage/prices/"+price, "", 200)
	key := "/manage/keys/" + c.call("POST", "/manage/keys", `{"name":"k","role":"viewer"}`, 201)
	c.call("GET", "/manage/keys?limit=1", "", 200)
	c.call("GET", "/manage/audit?limit=1&action=key.create", "", 200)
	c.call("GET", key, "", 200)
	c.call("PATCH", key, `{"role":"operator","expires_at":"2099-01-01T00:00:00Z"}`, 200)
	c.call("DELETE", key, "", 200)
	hook := "/manage/webhooks/" + c.call("POST", "/manage/webhooks",
		`{"name":"w","format":"standard","url":"`+c.provider.url+`","events":["token.expiring"]}`, 201)
	c.call("GET", "/manage/webhooks", "", 200)
	c.call("GET", hook, "", 200)
	c.call("PATCH", hook, `{"events":["limit.threshold"]}`, 200)
	c.call("POST", hook+"/rotate", "", 200)
	c.call("POST", hook+"/test", "", 200)
	delivery := c.call("POST", hook+"/test", "", 200)
	c.call("POST", hook+"/deliveries/"+delivery+"/redeliver", "", 200)
	c.call("GET", hook+"/deliveries?limit=1&state=pending", "", 200)
	c.call("GET", hook+"/deliveries?limit=1", "", 200)
	c.call("DELETE", hook, "", 200)
}

// reportUnseenResponses reports the successful responses and the properties that no call had.
func (s *spec) reportUnseenResponses() {
	s.t.Helper()
	for _, name := range s.operations() {
		for status, r := range s.at(s.operation(name), "responses") {
			where := fmt.Sprintf("%s %s ", name, status)
			if status[0] != '2' {
				continue
			}
			if !s.seen[where] {
				s.t.Errorf("%s: the test has no such response", where)
			}
			s.reportUnseen(where, s.at(r, "content", "application/json", "schema"))
		}
	}
}

// untilThrottled repeats a request with a wrong management key until such requests are too many.
func (p *testProxy) untilThrottled(method, path string) (res testResponse) {
	p.t.Helper()
	for i := 0; i <= maxAuthFailures && res.status != 429; i++ {
		res = p.do(method, path, "", "Authorization", "Bearer wrong", "X-Forwarded-For", "192.0.2.1")
	}
	return res
}

// TestOpenAPIErrors: each operation returns each error status that it declares, in OpenAI's form, and declares each
// that the test can cause.
func TestOpenAPIErrors(t *testing.T) {
	t.Parallel()
	s := readSpec(t)
	p := newTest(t, map[string]string{"TRUSTED_PROXIES": "127.0.0.1"})
	var viewer struct{ ID, Key string }
	p.manage("POST", "/manage/keys", `{"name":"v","role":"viewer"}`, 201, &viewer)
	p.secrets = append(p.secrets, viewer.Key)
	var hook, delivery struct{ ID string }
	p.manage("POST", "/manage/webhooks", `{"name":"w","format":"slack","url":"`+deadURL+`"}`, 201, &hook)
	p.manage("POST", "/manage/webhooks/"+hook.ID+"/test", ``, 200, &delivery)
	for _, name := range s.operations() {
		method, path := p.operationPath(name)
		path = strings.NewReplacer("/keys/none", "/keys/"+viewer.ID, "/webhooks/none", "/webhooks/"+hook.ID,
			"/deliveries/none", "/deliveries/"+delivery.ID).Replace(path)
		if !strings.HasPrefix(path, "/manage/") {
			continue
		}
		admin := "Bearer " + p.adminKey
		provoked := map[int]testResponse{
			400: p.do(method, path+"?a=1&a=2", "", "Authorization", admin),
			401: p.do(method, path, ""),
			403: p.do(method, path, "", "Authorization", "Bearer "+viewer.Key, "If-Match", `"1000"`),
			412: p.do(method, path, "{}", "Authorization", admin, "Content-Type", "application/json", "If-Match",
				`"1000"`),
			413: p.do(method, path, strings.Repeat(" ", maxManageBodyBytes+1), "Authorization", admin, "If-Match",
				`"1000"`),
			415: p.do(method, path, "{}", "Authorization", admin, "Content-Type", "text/plain", "If-Match", `"1000"`),
			421: p.do(method, path, "", "Authorization", admin, "Host", "evil.example.com"),
			429: p.untilThrottled(method, path),
			404: p.do(method, strings.NewReplacer(p.project, "none", p.upstream, "none", p.tokenID, "none",
				viewer.ID, "none", hook.ID, "none", "/sessions", "/sessions?session=none").Replace(path),
				jsonObject(requiredFields(p)[name]), "Authorization", admin, "Content-Type", "application/json"),
		}
		for status, res := range provoked {
			declared := s.at(s.operation(name), "responses", fmt.Sprint(status)) != nil
			if (res.status == status) != declared {
				t.Errorf("%s: provoking %d got %d %s; openapi.yaml declares it: %v", name, status, res.status, res.body,
					declared)
			}
			if res.status >= 300 {
				s.checkResponse(method, path, res)
			}
		}
		// The only other declared status is that of a database failure.
		for status := range s.at(s.operation(name), "responses") {
			if _, ok := provoked[atoi(status)]; !ok && status != "503" && status[0] != '2' {
				t.Errorf("%s declares %s, which this test does not provoke", name, status)
			}
		}
	}
}

func atoi(s string) (n int) {
	_, _ = fmt.Sscan(s, &n)
	return n
}

// readYAML returns a document as maps, lists and scalars.
func readYAML(text string) (any, error) {
	n, err := parseYAML(text)
	if err != nil {
		return nil, err
	}
	return plainValue(n), nil
}

func plainValue(n *yamlNode) any {
	switch {
	case n.value != nil:
		return n.value
	case n.isMap:
		m := map[string]any{}
		for _, item := range n.items {
			m[item.key] = plainValue(item)
		}
		return m
	}
	list := []any{}
	for _, item := range n.items {
		list = append(list, plainValue(item))
	}
	return list
}

// TestReadYAML: the reader returns what it supports, and refuses everything else.
func TestReadYAML(t *testing.T) {
	t.Parallel()
	got, err := readYAML("# c\na:\n  \"200\": \"x: #\\n\"\n  b: [p, \"null\", 1]\nl:\n  - k: v\n    m: true\n  - s\n")
	want := map[string]any{"a": map[string]any{"200": "x: #\n", "b": []any{"p", "null", 1.0}},
		"l": []any{map[string]any{"k": "v", "m": true}, "s"}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %v %v", got, err)
	}
	for _, bad := range []string{
		"a: b: c", "a: |\n  x", "a: {b: c}", "a: *x", "a: &x y", "a:\n - b", "a:\n   b: c", "a: b\na: c", "a: 'b'",
		"a: yes",
		"a: b # c", "a:\tb", "a: b ", "a", "- a\nb: c", "a: [b", "a: >-\n  b", "a: [[b]]", "a: \"b", "a:\nb: c",
		"--- a", "? a",
	} {
		if v, err := readYAML(bad); err == nil {
			t.Error(errors.New("accepted"), bad, v)
		}
	}
}
