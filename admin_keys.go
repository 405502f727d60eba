// The pages of /admin about management keys. The value of one is on one page
// only: the answer to the form that made it.
package main

import (
	"net/url"
	"strings"
	"time"
)

// A keyLine is a management key in the list.
type keyLine struct {
	keyView
	State stateView
	Own   bool // whoever looks is signed in with it
}

type keysView struct {
	Keys        []keyLine
	Next        string
	Environment bool // MANAGEMENT_TOKEN is set
}

func (s *server) keysPage(r *pageRequest) (*page, error) {
	rep, err := s.listKeys(r.asking("limit", "100", "after", r.query.Get("after")))
	if err != nil {
		return nil, err
	}
	l := rep.body.(list[keyView])
	v := keysView{Next: r.nextPage(l.Next), Environment: s.cfg.managementToken != nil}
	for _, k := range l.Data {
		v.Keys = append(v.Keys, keyLine{k, stateOfKey(&k, r.now), k.ID == r.actor.id})
	}
	return &page{template: "keys", title: "Management keys", data: v}, nil
}

func stateOfKey(k *keyView, now time.Time) stateView {
	switch {
	case k.RevokedAt != nil:
		return stateView{"bad", "revoked"}
	case !k.IsActive:
		return stateView{"bad", "expired"}
	case k.ExpiresAt != nil && int64(*k.ExpiresAt) <= now.Add(expiringSoon).UnixMilli():
		return stateView{"warn", "expires soon"}
	}
	return stateView{"good", "active"}
}

func keyFields() []*field {
	return []*field{
		{Name: "name", Label: "Name", Kind: "text", Required: true, Help: "Whose it is, or what uses it."},
		{Name: "role", Label: "Role", Kind: "select", Required: true, Options: []option{
			{string(roleViewer), "Viewer: sees everything but keys"}, {string(roleOperator), "Operator: also makes, changes and revokes tokens"},
			{string(roleAdmin), "Admin: does all"}}},
		{Name: "expires_at", Label: "Expires at (UTC)", Kind: "datetime-local", Short: true, Help: "Empty: it has no end."},
	}
}

// newKeyPage makes a management key, and shows it once.
func (s *server) newKeyPage(r *pageRequest) (*page, error) {
	v := &formView{Crumb: &option{"/admin/keys", "Management keys"}, Form: &pageForm{Action: "/admin/keys/new", Submit: "Make the key", Cancel: "/admin/keys",
		Once: randomBase62(16), Fields: keyFields()}}
	v.Form.fill(r.form, url.Values{"role": {string(roleViewer)}})
	p := &page{template: "form", title: "New management key", data: v}
	if !r.posted() {
		return p, nil
	}
	in := map[string]any{"name": r.form.Get("name"), "role": r.form.Get("role")}
	if at := r.form.Get("expires_at"); at != "" {
		in["expires_at"] = timeOf(at)
	}
	if !s.sent.first(r.form.Get("once")) {
		return r.sentBefore("/admin/keys", "key"), nil
	}
	rep, err := s.createKey(r.with(in))
	if err != nil {
		p.status, err = v.refused(err)
		return p, err
	}
	return &page{template: "key-once", title: "The management key is made", data: rep.body.(keyView)}, nil
}

// editKey changes a management key.
func (s *server) editKey(r *pageRequest) (*page, error) {
	rep, err := s.getKey(r.asking())
	if err != nil {
		return nil, err
	}
	k := rep.body.(keyView)
	v := &formView{Crumb: &option{"/admin/keys", "Management keys"}, Form: &pageForm{Action: "/admin/keys/" + k.ID + "/edit", Submit: "Save", Cancel: "/admin/keys",
		Version: k.Version, Fields: keyFields()}}
	stored := url.Values{"name": {k.Name}, "role": {string(k.Role)}}
	if k.ExpiresAt != nil {
		stored.Set("expires_at", k.ExpiresAt.field())
	}
	v.Form.fill(r.form, stored)
	p := &page{template: "form", title: "Edit " + k.Name, data: v}
	if !r.posted() {
		return p, nil
	}
	v.Form.Version = r.match
	in := map[string]any{"name": r.form.Get("name"), "role": r.form.Get("role")}
	if at := strings.TrimSpace(r.form.Get("expires_at")); at == "" {
		in["expires_at"] = nil
	} else if at != stored.Get("expires_at") { // else it stays as it is, to the millisecond
		in["expires_at"] = timeOf(at)
	}
	if _, err := s.patchKey(r.with(in)); err != nil {
		p.status, err = v.refused(err)
		return p, err
	}
	return goTo("/admin/keys", "saved"), nil
}

// revokeKeyPage ends a management key, and with it its sessions.
func (s *server) revokeKeyPage(r *pageRequest) (*page, error) {
	rep, err := s.getKey(r.asking())
	if err != nil {
		return nil, err
	}
	k := rep.body.(keyView)
	if !r.posted() {
		return r.confirm("Revoke the key "+k.Name+"?", "It stops working at once, for good, and whoever is signed in with it is signed out.", "Revoke", "/admin/keys"), nil
	}
	if _, err := s.revokeKey(r.with(nil)); err != nil {
		return nil, err
	}
	return goTo("/admin/keys", "revoked"), nil
}
