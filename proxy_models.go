// This file answers GET /v1/models and GET /v1beta/models from the lists of all of a project's providers, cut down to
// the models that the token may use: the only calls that go to several providers on purpose. Anthropic's and Google's
// lists come in pages; all are read, and the client gets pages of the merged list. It also answers GET
// /v1/llm-proxy/token. It opens no secret: proxy_attempts.go makes the calls, and masks the key in each page.
package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	maxMergedUpstreams = 8           // upstreams asked for one list
	maxListTime        = time.Minute // after that, no further page is asked for
	maxModelPages      = 20          // pages of each upstream's list
	maxModelList       = 8 << 20     // bytes of all lists of one call together
)

// mergedModels is a merged list of models while it is put together.
type mergedModels struct {
	source     modelListForm // of the upstreams' lists
	form       modelListForm // of the client's
	query      string        // of the page that is requested now
	bytesLeft  int           // bytes that further pages may have, over all upstreams
	seen       map[string]bool
	models     []listedModel
	lastStatus int    // of the last attempt
	lastReason string // what was wrong with the last attempt, if other lists make up the answer
}

// modelSources returns the upstreams whose lists make up the answer, in order of preference. Upstreams with the
// same base URL have the same list: the call's own upstream is asked first, the others are its spares. The
// result is nil if there is only one list, which is then forwarded like any answer. But a paged list that a
// policy cuts down is always merged: a page without some of its models could not say where the next begins.
func (t *attempts) modelSources() (list []*upstream) {
	c := t.c
	if !c.endpoint.listsModels() || hasParam(c.query, clientVersion) {
		return nil
	}
	paged := listFormOf(c.upstream.family()) != listOpenAI
	cutDown := paged && (c.project.policy.Models != nil || c.tokenState.policy.Models != nil)
	cutDown = cutDown || c.project.routing.Aliases != nil || c.convertsModels() // or adds to it, or changes it
	if len(c.project.upstreams) == 1 && !cutDown {
		return nil
	}
	want := c.criteria(c.readAt())
	want.api = c.upstream.family()
	for _, u := range c.project.upstreams {
		if u == c.upstream || want.fits(u) && u.health.available(want.now) {
			list = append(list, u)
		}
	}
	own := c.upstream.baseURL()
	if !cutDown && !slices.ContainsFunc(list, func(u *upstream) bool { return u.baseURL() != own }) {
		return nil
	}
	i, j := slices.IndexFunc(list, func(u *upstream) bool { return u.baseURL() == own }), slices.Index(list, c.upstream)
	list[i], list[j] = list[j], list[i]
	return list
}

// rewritesModelList reports whether the answer is a list of models that the proxy may put together or cut down.
func (c *call) rewritesModelList() bool {
	merged := len(c.project.upstreams) > 1 || c.project.routing.Aliases != nil || c.convertsModels()
	return c.convertsModels() || c.endpoint.listsModels() && (merged && !hasParam(c.query, clientVersion) ||
		c.project.policy.Models != nil || c.tokenState.policy.Models != nil)
}

// convertsModels reports whether Google's models are asked for at a URL of the other APIs.
func (c *call) convertsModels() bool {
	return c.endpoint.mayBeGoogles() && c.upstream.family() == apiGemini
}

// clientForm returns the form in which the client gets models that are converted.
func (c *call) clientForm() modelListForm {
	if c.shape == shapeAnthropic {
		return listAnthropic
	}
	return listOpenAI
}

// baseURL identifies a list of models: upstreams with the same base URL have the same list.
func (u *upstream) baseURL() string { return u.scheme + "://" + u.host + u.basePath }

// mergeModels requests the upstreams' lists and answers with the models of all of them that the token may use.
// It leaves out an upstream that does not give its complete list. If none does, the client gets the best of
// the other answers.
func (t *attempts) mergeModels(req *http.Request, list []*upstream) (*http.Response, error) {
	c, chosen := t.c, t.c.upstream
	n := &mergedModels{source: listFormOf(chosen.family()), bytesLeft: maxModelList, seen: map[string]bool{}}
	if n.form = n.source; c.convertsModels() {
		n.form = c.clientForm()
	}
	want, err := n.form.parsePageRequest(c.query)
	if err != nil {
		return nil, err
	}
	t.merged = n
	var good *http.Response
	var source *upstream
	var last modelListing
	asked, complete := 0, map[string]bool{}
	for _, u := range list {
		if asked == maxMergedUpstreams || asked > 0 && t.pastDeadline() {
			break
		}
		// pickUpstream has reserved this call in the chosen upstream's own limits already.
		if complete[u.baseURL()] || u != chosen && !u.health.admits(time.Now().UnixMilli(), 0, &u.settings, true) {
			continue
		}
		if asked++; asked > 1 {
			t.endAttempt(last.decision.reason, last.res)
		}
		c.setUpstream(u)
		if last = t.listModels(req); last.complete {
			complete[u.baseURL()] = true
			n.addFrom(u, last.models, c.mayUseModel)
			if good == nil {
				good, source = last.res, u
			}
		}
	}
	if good == nil {
		return t.bestResponse(last.res, last.err)
	}
	n.addAliases(c)
	n.lastReason = last.decision.reason
	if last.res != nil {
		n.lastStatus = last.res.StatusCode
		last.res.Body.Close()
	}
	c.setUpstream(source)
	return n.fillResponse(good, &want, c.shape)
}

// pastDeadline reports whether it is too late for another attempt.
func (t *attempts) pastDeadline() bool {
	return t.c.ctx.Err() != nil || time.Since(t.c.start) > maxListTime
}

// A modelListing is the result of requesting one upstream's list.
type modelListing struct {
	models   []json.RawMessage
	complete bool
	res      *http.Response // the last answer: a page, which has been read, or an error
	err      error
	decision retryDecision
}

// listModels requests the list of the call's upstream, page by page. Each page is an attempt and counts in the
// upstream's own limits.
func (t *attempts) listModels(req *http.Request) (l modelListing) {
	n, after := t.merged, ""
	for pages := 1; ; pages++ {
		n.query = n.source.pageQuery(t.c.query, after)
		l.res, l.err = t.attempt(req)
		if l.decision = t.classify(l.res, l.err); l.err != nil || l.res.StatusCode != http.StatusOK {
			return l
		}
		page, err := parseModelPage(n.source, l.res)
		if err != nil {
			l.err, l.decision.reason = err, "its list of models cannot be read"
			return l
		}
		l.models = append(l.models, page.entries...)
		if page.next == "" || page.next == after || len(page.next) > maxCursorBytes || pages == maxModelPages {
			l.complete = true
			return l
		}
		after = page.next
		switch now := time.Now().UnixMilli(); {
		case t.pastDeadline():
			l.err, l.decision.reason = errAttemptTimeout, "did not send its whole list in time"
		case !t.reserveCapacity(now):
			l.err, l.decision.reason = errModelList, "has reached its own limits before the last page"
		}
		if l.err != nil {
			return l
		}
		t.endAttempt(l.decision.reason, l.res)
	}
}

// parseModelPage parses the page that readModelPage has left in an answer, and empties the answer's body.
func parseModelPage(form modelListForm, res *http.Response) (modelPage, error) {
	text := peekBody(res)
	res.Body = http.NoBody // a page is not an answer for the client
	p, err := form.parsePage(text)
	if err != nil {
		return p, errModelList.withCause(err)
	}
	return p, nil
}

// addFrom adds the models of an upstream's list that the client may use and whose calls may go to that upstream.
// A model that the upstream knows by another name is added under both names, and no name twice.
func (n *mergedModels) addFrom(u *upstream, list []json.RawMessage, mayUse func(string) bool) {
	names := map[string][]string{} // the upstream's name of a model -> the clients' names
	for name, sent := range u.rewrite {
		names[sent] = append(names[sent], name)
	}
	add := func(id string, entry json.RawMessage) {
		if n.form != n.source {
			entry = n.form.convertModel(id, entry)
		}
		if !n.seen[id] && (len(u.models) == 0 || matchesAnyPattern(u.models, id)) && mayUse(id) {
			n.seen[id] = true
			n.models = append(n.models, listedModel{id, entry})
		}
	}
	for _, raw := range list {
		id, ok := n.source.modelID(raw)
		if !ok {
			continue
		}
		add(id, raw)
		for _, name := range slices.Sorted(slices.Values(names[id])) {
			add(name, n.source.renameModel(raw, name))
		}
	}
}

// addAliases adds the project's aliases of models that the client may use.
func (n *mergedModels) addAliases(c *call) {
	listed := func(model string) json.RawMessage {
		if i := slices.IndexFunc(n.models, func(m listedModel) bool { return m.id == model }); i >= 0 {
			return n.models[i].entry
		}
		return nil
	}
	names, entries := c.project.listAliases(criteria{api: c.upstream.family()}, listed, c.mayUseModel)
	for i, name := range names {
		if !n.seen[name] {
			n.seen[name] = true
			if n.form != n.source {
				entries[i] = n.form.convertModel(name, nil)
			}
			n.models = append(n.models, listedModel{name, n.form.renameModel(entries[i], name)})
		}
	}
}

// fillResponse makes the list the body of res, or the requested page of a paged list.
func (n *mergedModels) fillResponse(
	res *http.Response, want *modelPageRequest, shape errorShape,
) (*http.Response, error) {
	page, more, failed := n.models, false, (*apiError)(nil)
	if n.form != listOpenAI {
		page, more, failed = want.selectPage(n.models)
	}
	body, err := json.Marshal(n.form.document(page, more))
	if err != nil {
		return nil, err
	}
	if failed != nil { // answered as by a provider: the call has been to at least one
		res.StatusCode, body = failed.status, failed.responseBody(shape)
	}
	replaceBody(res, body)
	return res, nil
}

// replaceBody replaces an answer's body, and drops the headers that describe the provider's bytes.
func replaceBody(res *http.Response, body []byte) {
	for _, name := range [...]string{"Etag", "Last-Modified", "Accept-Ranges"} {
		delete(res.Header, name)
	}
	res.Body, res.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	res.Header.Set("Content-Length", strconv.Itoa(len(body)))
}

const ownTokenPath = "/v1/llm-proxy/token"

// An ownToken describes a token to its own client. The lists are those of the token's policy; its project's
// may be narrower.
type ownToken struct {
	Object            string      `json:"object"`
	ID                string      `json:"id"`
	Name              string      `json:"name"`
	ExpiresAt         *timestamp  `json:"expires_at"`
	IdleExpiryMinutes *int64      `json:"idle_expiry_minutes"`
	OverlapUntil      *timestamp  `json:"overlap_until"` // not null: the value is an old one, valid until then
	MaxRequests       *int64      `json:"max_requests"`
	RequestCount      int64       `json:"request_count"`
	RequestsLeft      *int64      `json:"requests_left"`
	Endpoints         []string    `json:"endpoints"` // null: all
	Models            []string    `json:"models"`    // null: all
	Limits            []limitView `json:"limits"`
}

// handleOwnToken answers GET /v1/llm-proxy/token.
func (p *proxy) handleOwnToken(w http.ResponseWriter, r *http.Request) {
	c := p.newCall(w, r)
	c.limitUnreadBody(r)
	if err := p.authenticate(c, r); err != nil {
		p.refuse(c, w, r, err)
		return
	}
	defer c.token.running.Add(-1) // not release: this is not a use of the token
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		p.refuse(c, w, r, errMethodNotAllowed("GET or HEAD"))
		return
	}
	v, err := p.ownToken(c)
	if err != nil {
		p.refuse(c, w, r, errLimitsUnavailable(err))
		return
	}
	body, err := json.Marshal(v)
	if err != nil {
		p.refuse(c, w, r, err)
		return
	}
	_ = c.controller.SetWriteDeadline(time.Now().Add(writeTimeout))
	h := w.Header()
	c.rates.write(h)
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)+1))
	h.Set("Cache-Control", "no-store")
	_, _ = w.Write(append(body, '\n'))
	p.log.Debug("own token", "request_id", c.requestID, "route", "GET "+ownTokenPath, "status", http.StatusOK,
		"token", c.tokenState.id, "project", c.project.id, "address", c.address,
		"total_us", time.Since(c.start).Microseconds())
}

func (p *proxy) ownToken(c *call) (*ownToken, error) {
	now := p.limits.now(c.start)
	t, st := c.token, c.tokenState
	v := &ownToken{Object: "llm_proxy.token", ID: st.id, Name: st.name, RequestCount: t.used.Load(),
		Endpoints: st.policy.Endpoints, Models: st.policy.Models}
	if st.expiresAt != 0 {
		v.ExpiresAt = new(timestamp(st.expiresAt))
	}
	if st.idleExpiry != 0 {
		v.IdleExpiryMinutes = new(st.idleExpiry / time.Minute.Milliseconds())
	}
	if c.credentialHash == st.oldHash {
		v.OverlapUntil = new(timestamp(st.oldHashUntil))
	}
	if st.maxRequests >= 0 {
		v.MaxRequests, v.RequestsLeft = new(st.maxRequests), new(max(0, st.maxRequests-v.RequestCount))
	}
	l := &t.project.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := p.limits.syncLimits(t, now); err != nil {
		return nil, err
	}
	v.Limits = newLimitViews(t.limits.counters, valueQuery{}, now)
	c.rates = t.rateHeaders(st.maxRequests, nil, now)
	return v, nil
}

// rewriteModels removes the models that the token may not use from a single provider's list, unless no policy lists
// models, and converts a single model of Google's that is asked for at the URL of the other APIs.
func rewriteModels(c *call, res *http.Response) error {
	filters := c.endpoint.pattern == listPattern && c.attempts.merged == nil &&
		(c.project.policy.Models != nil || c.tokenState.policy.Models != nil)
	converts := c.endpoint.pattern == onePattern && c.convertsModels()
	if !filters && !converts {
		return nil
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, maxModelList+1))
	if err != nil || len(body) > maxModelList {
		return errModelList.withCause(errors.Join(err, errors.New("reading the list of models")))
	}
	if converts {
		if _, ok := listGoogle.modelID(body); !ok {
			return errModelList.withCause(errors.New("the answer is not a model"))
		}
		body = c.clientForm().convertModel(c.askedModel(), body)
	} else if body, err = filterModelList(body, c.mayUseModel); err != nil {
		return errModelList.withCause(err)
	}
	res.Body.Close()
	replaceBody(res, body)
	delete(res.Header, "X-Models-Etag")
	return nil
}

// A modelListForm is how an API writes its list of models.
type modelListForm uint8

const (
	listOpenAI    modelListForm = iota // {"data":[{"id":…}]}, never in pages
	listAnthropic                      // {"data":[{"id":…}],"has_more":…,"last_id":…}
	listGoogle                         // {"models":[{"name":"models/…"}],"nextPageToken":…}
)

// listFormOf returns the form of an API's lists.
func listFormOf(api apiFamily) modelListForm {
	switch api {
	case apiAnthropic:
		return listAnthropic
	case apiGemini:
		return listGoogle
	}
	return listOpenAI
}

const (
	maxModelPageSize = 1000 // models: Anthropic's limit, and Google's
	maxCursorBytes   = 512  // of what names the next page
	googleModelName  = "models/"
)

// pageParams returns the names of the query parameters for the size of a page, and for the page after a model. Only
// Anthropic's API has one for the page before a model.
func (f modelListForm) pageParams() (size, after, before string) {
	if f == listGoogle {
		return "pageSize", "pageToken", ""
	}
	return "limit", "after_id", "before_id"
}

// pageQuery returns the query for a page of an upstream's list; after is "" for the first. All pages are requested,
// whichever page the client wants.
func (f modelListForm) pageQuery(query, after string) string {
	q, err := url.ParseQuery(query)
	if f == listOpenAI || err != nil { // an error is impossible: checkQuery has parsed the query
		return query
	}
	if f == listGoogle { // whose upstreams may be asked for another API's list
		q = url.Values{}
	}
	size, cursor, before := f.pageParams()
	q.Del(before)
	q.Del(cursor)
	q.Set(size, strconv.Itoa(maxModelPageSize))
	if after != "" {
		q.Set(cursor, after)
	}
	return q.Encode()
}

// A modelPage is a page of an upstream's list.
type modelPage struct {
	entries []json.RawMessage
	next    string // what names the next page; "" if there is none
}

// parsePage parses a page of an upstream's list.
func (f modelListForm) parsePage(text []byte) (p modelPage, err error) {
	var v struct {
		Data    []json.RawMessage `json:"data"`
		HasMore bool              `json:"has_more"`
		LastID  string            `json:"last_id"`
		Models  []json.RawMessage `json:"models"`
		Next    string            `json:"nextPageToken"`
	}
	if err := json.Unmarshal(text, &v); err != nil {
		return p, err
	}
	p.entries = v.Data
	switch {
	case f == listGoogle:
		p.entries, p.next = v.Models, v.Next
		if string(bytes.TrimSpace(text)) == "{}" { // Google leaves out what is empty
			return p, nil
		}
	case f == listAnthropic && v.HasMore:
		p.next = v.LastID
	}
	if p.entries == nil {
		return p, errors.New("the answer is not a list of models")
	}
	return p, nil
}

// modelID returns the id of a model by its entry in a list.
func (f modelListForm) modelID(entry json.RawMessage) (id string, ok bool) {
	var m map[string]json.RawMessage
	member := "id"
	if f == listGoogle {
		member = "name"
	}
	if json.Unmarshal(entry, &m) != nil || json.Unmarshal(m[member], &id) != nil {
		return "", false
	}
	if f == listGoogle {
		return strings.CutPrefix(id, googleModelName)
	}
	return id, true
}

// renameModel returns an entry of a list of models, an object, with another id, which also stands in for an empty
// display name.
func (f modelListForm) renameModel(entry json.RawMessage, id string) json.RawMessage {
	m := map[string]json.RawMessage{}
	_ = json.Unmarshal(entry, &m) // it was parsed before
	for _, name := range [...]string{"display_name", "displayName"} {
		if string(m[name]) == `""` {
			m[name], _ = json.Marshal(id)
		}
	}
	if f == listGoogle {
		m["name"], _ = json.Marshal(googleModelName + id)
	} else {
		m["id"], _ = json.Marshal(id) // a string: it cannot fail
	}
	out, _ := json.Marshal(m) // raw JSON that was parsed: the same
	return out
}

// convertModel returns the entry, in a list of this form, of a model that has another entry in Google's.
func (f modelListForm) convertModel(id string, entry json.RawMessage) json.RawMessage {
	var m struct {
		DisplayName string `json:"displayName"`
	}
	_ = json.Unmarshal(entry, &m) // it may be nil; without a name, the id stands in
	converted := map[string]any{"id": id, "object": "model", "created": 0, "owned_by": "google"}
	if f == listAnthropic {
		converted = map[string]any{"id": id, "type": "model", "display_name": cmp.Or(m.DisplayName, id),
			"created_at": "1970-01-01T00:00:00Z"} // Anthropic's value for an unknown date
	}
	out, _ := json.Marshal(converted) // strings and numbers: it cannot fail
	return out
}

// A listedModel is a model in the list for the client.
type listedModel struct {
	id    string
	entry json.RawMessage
}

// document returns the list of models for the client, or a page of it. more: others follow in the same direction.
func (f modelListForm) document(page []listedModel, more bool) map[string]any {
	entries := make([]json.RawMessage, 0, len(page))
	for _, m := range page {
		entries = append(entries, m.entry)
	}
	switch f {
	case listGoogle:
		list := map[string]any{"models": entries}
		if more {
			list["nextPageToken"] = page[len(page)-1].id
		}
		return list
	case listAnthropic:
		list := map[string]any{"data": entries, "has_more": more, "first_id": nil, "last_id": nil}
		if len(page) > 0 {
			list["first_id"], list["last_id"] = page[0].id, page[len(page)-1].id
		}
		return list
	}
	return map[string]any{"object": "list", "data": entries}
}

// A modelPageRequest is the page that a client asks for: at most limit models, after or before a model.
type modelPageRequest struct {
	form          modelListForm
	limit         int
	after, before string
}

// parsePageRequest reads which page the client asks for.
func (f modelListForm) parsePageRequest(query string) (w modelPageRequest, err error) {
	q, err := url.ParseQuery(query)
	if f == listOpenAI || err != nil {
		return w, nil
	}
	size, after, before := f.pageParams()
	w = modelPageRequest{form: f, limit: 20, after: q.Get(after), before: q.Get(before)} // Anthropic's default
	if s := q.Get(size); s != "" {
		w.limit, err = strconv.Atoi(s)
	}
	if f == listGoogle && err == nil && w.limit >= 0 { // where 0 is the default, and too much is the most
		w.limit = min(cmp.Or(w.limit, 50), maxModelPageSize)
	}
	if err != nil || w.limit < 1 || w.limit > maxModelPageSize {
		return w, errPageSize(size, maxModelPageSize)
	}
	if w.after != "" && w.before != "" {
		return w, errTwoCursors
	}
	return w, nil
}

// selectPage returns the page and whether more models follow in the same direction. A cursor that is not in the
// list is an error: an empty page would look like the end of the list.
func (w *modelPageRequest) selectPage(models []listedModel) (page []listedModel, more bool, err *apiError) {
	at := func(param, id string) int {
		i := slices.IndexFunc(models, func(m listedModel) bool { return m.id == id })
		if i < 0 {
			err = errUnknownCursor(param)
		}
		return i
	}
	from, to := 0, len(models)
	_, after, before := w.form.pageParams()
	switch {
	case w.before != "":
		to = max(0, at(before, w.before))
		from = max(0, to-w.limit)
		return models[from:to], from > 0, err
	case w.after != "":
		from = at(after, w.after) + 1
	}
	to = min(to, from+w.limit)
	return models[from:to], to < len(models), err
}

// filterModelList returns a provider's list of models with those that the client may use: {"data":[{"id":…}]}, or
// {"models":[{"slug":…}]} as Codex gets it.
func filterModelList(body []byte, mayUse func(string) bool) ([]byte, error) {
	var list map[string]json.RawMessage
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, err
	}
	if list["data"] == nil && list["models"] == nil {
		return nil, errors.New("the answer is not a list of models")
	}
	for _, member := range [...]string{"data", "models"} {
		var models []json.RawMessage
		if list[member] == nil {
			continue
		}
		if err := json.Unmarshal(list[member], &models); err != nil {
			return nil, err
		}
		kept := []json.RawMessage{}
		for _, raw := range models {
			var m struct {
				ID   string `json:"id"`
				Slug string `json:"slug"`
			}
			if json.Unmarshal(raw, &m) == nil && mayUse(cmp.Or(m.ID, m.Slug)) {
				kept = append(kept, raw)
			}
		}
		list[member], _ = json.Marshal(kept) // it was valid JSON
	}
	delete(list, "first_id") // Anthropic's cursors name models
	delete(list, "last_id")
	return json.Marshal(list)
}
