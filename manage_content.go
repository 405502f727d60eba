// This room shows kept content to administrators, and erases it. Nothing is
// shown that the audit trail does not have first.
package main

import (
	"encoding/base64"
	"fmt"
	"time"
	"unicode/utf8"
)

const actionErase = "content.erase"

// A contentView is what is kept of a call.
type contentView struct {
	ID      string   `json:"id"`
	Until   stamp    `json:"kept_until"`
	Request bodyView `json:"request"`
	Answer  bodyView `json:"answer"`
}

// A bodyView is one body: as text, or in base64 if it is none.
type bodyView struct {
	Bytes  int64   `json:"bytes"`
	Kept   int64   `json:"kept_bytes"`
	Text   *string `json:"text"`
	Base64 *string `json:"base64"`
}

// showBody shows a body of size bytes, of which kept are the first. A character
// that was cut in two at the end is left out.
func showBody(kept string, size int64) bodyView {
	v := bodyView{Bytes: size, Kept: int64(len(kept))}
	whole := kept
	for cut := 0; cut < utf8.UTFMax && int64(len(kept)) < size && !utf8.ValidString(whole); cut++ {
		whole = kept[:max(len(kept)-cut-1, 0)]
	}
	if utf8.ValidString(whole) {
		v.Text = &whole
	} else {
		v.Base64 = new(base64.StdEncoding.EncodeToString([]byte(kept)))
	}
	return v
}

func (s *server) getContent(r *manageRequest) (*reply, error) {
	if err := r.only(); err != nil {
		return nil, err
	}
	id := parseRequestID(r.path("id"))
	if id == 0 {
		return nil, errNotFound
	}
	v, err := s.revealContent(r, id)
	if err != nil {
		return nil, err
	}
	return &reply{body: v}, nil
}

// revealContent returns a call's content, after the audit trail says who saw it.
func (s *server) revealContent(r *manageRequest, id int64) (*contentView, error) {
	row, err := s.store.contentByID(r.ctx, id, r.now.UnixMilli())
	if err != nil {
		return nil, err
	}
	if err := s.store.note(r.ctx, r.by, act{actionReveal, requestID(id), []fact{{"what", "content"}}}); err != nil {
		return nil, fmt.Errorf("noting who saw content: %w", err)
	}
	request, answer, err := s.contents.open(row)
	if err != nil {
		return nil, fmt.Errorf("content of %s: %w", requestID(id), err)
	}
	return &contentView{requestID(id), stamp(row.until), showBody(request(), row.requestBytes), showBody(answer(), row.answerBytes)}, nil
}

// eraseContent deletes all that is kept of a project's calls, in steps between
// which calls are written.
func (s *server) eraseContent(r *manageRequest) (*reply, error) {
	p, err := s.store.projectByID(r.ctx, r.path("id"))
	if err != nil {
		return nil, err
	}
	if err := s.store.note(r.ctx, r.by, act{actionErase, p.id, nil}); err != nil {
		return nil, fmt.Errorf("noting who erases content: %w", err)
	}
	var erased int64
	for {
		n, err := s.store.dropProjectContents(r.ctx, p.seq, 100)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return &reply{body: struct {
				Erased int64 `json:"erased"`
			}{erased}}, nil
		}
		erased += n
		time.Sleep(time.Millisecond)
	}
}
