// SQL for kept content. The ledger's writer puts it in, with the row of the call
// (store_ledger.go); here it is read and let go.
package main

import (
	"context"
	"errors"
	"fmt"
)

const contentStatement = `
	INSERT INTO contents (id, project, until, request, request_bytes, answer, answer_bytes) VALUES (?, ?, ?, ?, ?, ?, ?)
	ON CONFLICT DO NOTHING`

// contentByID returns what is kept of a call at now, or errNotFound.
func (s *store) contentByID(ctx context.Context, id, now int64) (*contentRow, error) {
	c := &contentRow{id: id}
	err := s.read.QueryRowContext(ctx, `
		SELECT project, until, request, request_bytes, answer, answer_bytes FROM contents WHERE id = ? AND until > ?`, id, now).
		Scan(&c.project, &c.until, &c.request, &c.requestBytes, &c.answer, &c.answerBytes)
	if err != nil {
		return nil, found(err)
	}
	return c, nil
}

// contentUntil returns until when content of a call is kept, 0 if none is.
func (s *store) contentUntil(ctx context.Context, id int64) (until int64, err error) {
	err = s.read.QueryRowContext(ctx, `SELECT until FROM contents WHERE id = ?`, id).Scan(&until)
	if err = found(err); errors.Is(err, errNotFound) {
		return 0, nil
	}
	return until, err
}

// forgetContents deletes up to limit contents that are kept until now or less,
// and returns how many.
func (s *store) forgetContents(ctx context.Context, now int64, limit int) (int64, error) {
	return s.dropContents(ctx, `
		DELETE FROM contents WHERE id IN (SELECT id FROM contents WHERE until <= ? ORDER BY until LIMIT ?)`, now, limit)
}

// dropOldContents deletes up to limit contents, of the oldest calls first.
func (s *store) dropOldContents(ctx context.Context, limit int) (int64, error) {
	return s.dropContents(ctx, `
		DELETE FROM contents WHERE id IN (SELECT id FROM contents WHERE id > ? ORDER BY id LIMIT ?)`, 0, limit)
}

// dropProjectContents deletes up to limit contents of a project.
func (s *store) dropProjectContents(ctx context.Context, project int64, limit int) (int64, error) {
	return s.dropContents(ctx, `
		DELETE FROM contents WHERE id IN (SELECT id FROM contents WHERE project = ? ORDER BY id LIMIT ?)`, project, limit)
}

func (s *store) dropContents(ctx context.Context, text string, of int64, limit int) (int64, error) {
	res, err := s.write.ExecContext(ctx, text, of, limit)
	if err != nil {
		return 0, fmt.Errorf("deleting contents: %w", err)
	}
	return res.RowsAffected()
}
