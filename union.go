// This room puts one list of models together from those of a project's several
// providers. It is the one call that goes to more than one of them on purpose.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
)

// maxUnion bounds the providers that one list is put together from.
const maxUnion = 8

// united returns the upstreams whose lists make up the answer: one for each base
// URL, the most preferred first. Fewer than two: the call goes its usual way.
// Anthropic's lists come in pages and are not put together.
func (t *tries) united() (list []*upstream) {
	c := t.c
	if c.endpoint.pattern != "/v1/models" || c.upstream.provider == providerAnthropic || len(c.project.upstreams) == 1 {
		return nil
	}
	w := c.wish(c.start.UnixMilli())
	w.api = apiOpenAI
	place := func(u *upstream) string { return u.scheme + "://" + u.host + u.basePath }
	seen := map[string]bool{}
	for _, u := range c.project.upstreams {
		if len(list) == maxUnion || seen[place(u)] {
			continue
		}
		chosen := u == c.upstream // which has been taken from its limits
		if chosen || place(u) != place(c.upstream) && w.fits(u) && u.health.mayTry(w.now) && u.health.room(w.now, 0, &u.settings, true) {
			seen[place(u)] = true
			list = append(list, u)
		}
	}
	return list
}

// unite asks each upstream for its list and answers with all of them together.
// One that does not answer is left out; if none does, the client gets what the
// last one said.
func (t *tries) unite(req *http.Request, list []*upstream) (*http.Response, error) {
	var merged []json.RawMessage
	var first *http.Response
	var by *upstream
	known := map[string]bool{}
	for i, u := range list {
		t.c.upstream = u
		t.c.shown.Store(u)
		res, err := t.attempt(req)
		v := t.judge(res, err)
		good := err == nil && res.StatusCode == http.StatusOK
		if good {
			models, err := modelsOf(res)
			if good = err == nil; !good {
				v.reason = "its list of models cannot be read"
			}
			if merged = u.offers(merged, models, known); good && first == nil {
				first, by = res, u
			}
		}
		last := i+1 == len(list) || t.c.ctx.Err() != nil
		if last && first == nil && err == nil && res.StatusCode == http.StatusOK {
			return nil, errUnreadableList()
		}
		if last && first == nil {
			return res, err
		}
		if last {
			break
		}
		t.leave(&v, res)
	}
	t.c.upstream = by
	t.c.shown.Store(by)
	body, err := json.Marshal(map[string]any{"object": "list", "data": merged})
	if err != nil {
		return nil, err
	}
	first.Body, first.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	first.Header.Set("Content-Length", strconv.Itoa(len(body)))
	return first, nil
}

// modelsOf reads a list of models, within the limit for one, and closes it.
func modelsOf(res *http.Response) ([]json.RawMessage, error) {
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxModelList+1))
	if err != nil || len(body) > maxModelList {
		return nil, errors.Join(err, errors.New("reading a list of models"))
	}
	var list struct{ Data []json.RawMessage }
	if err := json.Unmarshal(body, &list); err != nil || list.Data == nil {
		return nil, errors.New("a list of models is none")
	}
	return list.Data, nil
}

// offers appends to merged the models of an upstream's list that calls for would
// go there, those it has another name for under both, and none twice.
func (u *upstream) offers(merged, list []json.RawMessage, known map[string]bool) []json.RawMessage {
	names := map[string][]string{} // the upstream's own -> clients'
	for asked, sent := range u.rewrite {
		names[sent] = append(names[sent], asked)
	}
	add := func(id string, entry json.RawMessage) {
		if !known[id] && (len(u.models) == 0 || matchesAny(u.models, id)) {
			known[id] = true
			merged = append(merged, entry)
		}
	}
	for _, raw := range list {
		var m map[string]json.RawMessage
		var id string
		if json.Unmarshal(raw, &m) != nil || json.Unmarshal(m["id"], &id) != nil {
			continue
		}
		add(id, raw)
		for _, asked := range names[id] {
			m["id"], _ = json.Marshal(asked) // a string
			if entry, err := json.Marshal(m); err == nil {
				add(asked, entry)
			}
		}
	}
	return merged
}
