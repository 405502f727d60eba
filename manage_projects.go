// Handlers of /manage for projects. A provider's key comes in here and never
// goes out again: no answer has it, whatever the role.
package main

import (
	"encoding/json"
	"errors"
	"net/http"
)

type projectView struct {
	ID        string          `json:"id"`
	Name      string          `json:"name"`
	IsActive  bool            `json:"is_active"`
	Policy    json.RawMessage `json:"policy"`
	Routing   json.RawMessage `json:"routing"`
	Upstreams []upstreamView  `json:"upstreams"`
	Version   int64           `json:"version"`
	CreatedAt stamp           `json:"created_at"`
	UpdatedAt stamp           `json:"updated_at"`
	Limits    []limitView     `json:"limits,omitzero"` // how those of the policy stand; of one project that is read
}

// showProject reads the project's upstreams to go with it.
func (s *server) showProject(r *manageRequest, p *projectRow) (projectView, error) {
	ups, err := s.store.upstreamsOf(r.ctx, p.seq)
	v := projectView{p.id, p.name, p.active, json.RawMessage(p.policy), json.RawMessage(p.routing), []upstreamView{}, p.version, stamp(p.createdAt), stamp(p.updatedAt), nil}
	for i := range ups {
		v.Upstreams = append(v.Upstreams, s.showUpstream(&ups[i]))
	}
	return v, err
}

func (s *server) replyProject(r *manageRequest, status int, p *projectRow) (*reply, error) {
	v, err := s.showProject(r, p)
	return &reply{status, p.version, v}, err
}

func (s *server) listProjects(r *manageRequest) (*reply, error) {
	page, err := r.page("active", "name")
	if err != nil {
		return nil, err
	}
	active, err := r.boolean("active")
	if err != nil {
		return nil, err
	}
	rows, err := s.store.listProjects(r.ctx, page.seq, page.limit+1, active, r.query.Get("name"))
	if err != nil {
		return nil, err
	}
	views := make([]projectView, 0, len(rows))
	for i := range rows {
		v, err := s.showProject(r, &rows[i])
		if err != nil {
			return nil, err
		}
		views = append(views, v)
	}
	l := list[projectView]{Data: views[:min(len(views), page.limit)]}
	if len(rows) > page.limit {
		l.Next = cursor(rows[page.limit-1].seq, "")
	}
	return &reply{body: l}, nil
}

// createProject makes a project and, when a key is given, its first upstream.
func (s *server) createProject(r *manageRequest) (*reply, error) {
	var name, provider, baseURL opt[string]
	var key, openaiKey opt[secret]
	var active opt[bool]
	var pol, rt opt[json.RawMessage]
	if err := decodeObject(r.body, map[string]any{"name": &name, "api_key": &key, "openai_api_key": &openaiKey,
		"provider": &provider, "base_url": &baseURL, "is_active": &active, "policy": &pol, "routing": &rt}); err != nil {
		return nil, err
	}
	if err := checkName(name.v); err != nil {
		return nil, err
	}
	if key.given() && openaiKey.given() {
		return nil, &fieldError{"api_key", "and openai_api_key exclude each other"}
	}
	now := r.now.UnixMilli()
	p := &projectRow{id: newID("proj"), name: name.v, active: !active.given() || active.v, policy: "{}", routing: "{}", createdAt: now, updatedAt: now}
	if pol.given() {
		parsed, err := parsePolicy(pol.v, true)
		if err != nil {
			return nil, err
		}
		p.policy = parsed.String()
	}
	if rt.given() {
		parsed, err := parseRouting(rt.v)
		if err != nil {
			return nil, err
		}
		p.routing = parsed.String()
	}
	var up *upstreamRow
	if openaiKey.given() {
		key = openaiKey
	}
	if key.given() {
		in := upstreamInput{name: opt[string]{set: true, v: "primary"}, provider: provider, baseURL: baseURL, key: key}
		up = newUpstreamRow(p, now)
		if err := in.apply(s, up, true); err != nil {
			return nil, err
		}
	} else if provider.set || baseURL.set {
		return nil, &fieldError{"api_key", "is needed with provider or base_url"}
	}
	if err := s.store.addProject(r.ctx, r.by, p, up); err != nil {
		return nil, err
	}
	return s.replyProject(r, http.StatusCreated, p)
}

func (s *server) getProject(r *manageRequest) (*reply, error) {
	p, err := s.store.projectByID(r.ctx, r.path("id"))
	if err != nil {
		return nil, err
	}
	v, err := s.showProject(r, &p)
	if err == nil {
		v.Limits, err = s.projectLimits(r.ctx, &p, r.now.UnixMilli())
	}
	return &reply{0, p.version, v}, err
}

func (s *server) patchProject(r *manageRequest) (*reply, error) {
	var name opt[string]
	var active opt[bool]
	var pol, rt opt[json.RawMessage]
	if err := decodeObject(r.body, map[string]any{"name": &name, "is_active": &active, "policy": &pol, "routing": &rt}, "policy", "routing"); err != nil {
		return nil, err
	}
	p, err := s.store.changeProject(r.ctx, r.by, r.path("id"), r.match, r.now.UnixMilli(), func(p *projectRow) error {
		if name.set {
			if err := checkName(name.v); err != nil {
				return err
			}
			p.name = name.v
		}
		if active.set {
			p.active = active.v
		}
		if pol.set {
			parsed, err := parsePolicy(orEmpty(pol), true)
			if err != nil {
				return err
			}
			p.policy = parsed.String()
		}
		if rt.set {
			parsed, err := parseRouting(orEmpty(rt))
			if err != nil {
				return err
			}
			p.routing = parsed.String()
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := s.registry.projectChanged(r.ctx, p.seq, false); err != nil {
		return nil, err
	}
	return s.replyProject(r, 0, &p)
}

// orEmpty returns an object that was given, or the empty one for null.
func orEmpty(p opt[json.RawMessage]) []byte {
	if p.null {
		return []byte("{}")
	}
	return p.v
}

func (s *server) deleteProject(r *manageRequest) (*reply, error) {
	p, err := s.store.deleteProject(r.ctx, r.by, r.path("id"), r.match, r.now.UnixMilli())
	if err != nil {
		return nil, err
	}
	if err := errors.Join(s.registry.projectChanged(r.ctx, p.seq, true), s.registry.upstreamsChanged(r.ctx, p.seq, nil)); err != nil {
		return nil, err
	}
	return &reply{body: map[string]any{"id": p.id, "deleted": true}}, nil
}

func (s *server) revokeProjectTokens(r *manageRequest) (*reply, error) {
	if err := decodeObject(r.body, map[string]any{}); err != nil {
		return nil, err
	}
	p, err := s.store.projectByID(r.ctx, r.path("id"))
	if err != nil {
		return nil, err
	}
	n, err := s.store.revokeTokens(r.ctx, r.by, p.id, r.now.UnixMilli())
	if err != nil {
		return nil, err
	}
	if err := s.registry.projectChanged(r.ctx, p.seq, true); err != nil {
		return nil, err
	}
	return &reply{body: map[string]any{"revoked": n}}, nil
}
